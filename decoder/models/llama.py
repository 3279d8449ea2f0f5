"""The Llama family's forward over slot caches: Llama, Mistral, Qwen2, Qwen3.

The same numbers as `transformers`, with nothing computed twice: query, key and value projections are one product, so
are gate and up; keys and values are written in place; the query heads that share a key-value head are further positions
of one attention, not copies of it. The residual stream is float32. What lies between the products is `Operations`.

Legend: B sequences, T new tokens, N = B × T and padding, U visible positions, E hidden size, H query heads, K key-value
heads, G = H / K, D head size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from decoder.models.base import fit_vocabulary
from decoder.models.cuda_graphs import CudaGraphs
from decoder.models.hidden import HiddenStates
from decoder.models.kv_cache import KVCache, Slots, TreePositions
from decoder.models.linear import Linear, padded
from decoder.models.ops import Norms, Operations, Place, Rotations, operations

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
ROTATIONS = {
    "default",
    "linear",
    "llama3",
    "yarn",
}  # those whose angles do not depend on the context's length


def supported(config: PretrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILIES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROTATIONS
    )


class Layer:
    def __init__(
        self, index: int, state: Mapping[str, Tensor], config: PretrainedConfig, ops: Operations
    ) -> None:
        at = f"model.layers.{index}."
        self.index, self.eps, self.ops = index, config.rms_norm_eps, ops
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv = _stack(state, [f"{at}self_attn.{name}_proj" for name in "qkv"])
        self.out = _stack(state, [f"{at}self_attn.o_proj"])
        self.gate_up = _stack(state, [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"])
        self.down = _stack(state, [f"{at}mlp.down_proj"])
        self.norm = state[f"{at}input_layernorm.weight"]
        self.mlp_norm = state[f"{at}post_attention_layernorm.weight"]
        q_norm, k_norm = (state.get(f"{at}self_attn.{name}_norm.weight") for name in "qk")
        self.head_norms = Norms(q_norm, k_norm, self.eps)

    def grow(self, cache: KVCache) -> None:
        """Adds this layer to the cache."""
        cache.grow(
            self.kv_heads,
            sum(self.qkv.sizes) // (self.heads + 2 * self.kv_heads),
            self.norm.dtype,
            self.norm.device,
        )

    def __call__(self, x_NE: Tensor, y_NE: Tensor | None, place: Place, cache: KVCache) -> Tensor:
        """Adds y, what the layer before has to add, to the residual stream x in place; returns what this one has."""
        y_NE = self._attention(self.ops.add_norm(x_NE, y_NE, self.norm, self.eps), place, cache)
        return self.down(
            self.ops.gate(self.gate_up(self.ops.add_norm(x_NE, y_NE, self.mlp_norm, self.eps)))
        )

    def _attention(self, x_NE: Tensor, place: Place, cache: KVCache) -> Tensor:
        q_BKQD = self.ops.turn(
            self.qkv(x_NE), self.heads, place, self.head_norms, cache, self.index
        )
        keys_BKUD, values_BKUD = cache.read(self.index, place.slots, place.upto)
        y_BKQD = F.scaled_dot_product_attention(q_BKQD, keys_BKUD, values_BKUD, place.bias_B1QU)
        (B, K, Q, D), T = q_BKQD.shape, place.tokens
        y_NX = y_BKQD.view(B, K, Q // T, T, D).permute(0, 3, 1, 2, 4).reshape(B * T, -1)
        return self.out(_pad(y_NX, len(x_NE)))


class Llama:
    """A `LanguageModel`, and `Weighted`: its weights can be replaced while it serves."""

    def __init__(self, module: nn.Module, cache: KVCache, vocab_size: int) -> None:
        config: PretrainedConfig = module.config  # type: ignore[assignment]
        state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        self.vocab_size, self.mask_id, self.cache = vocab_size, int(config.pad_token_id or 0), cache
        self.embedding = state["model.embed_tokens.weight"]
        self.norm, self.eps = state["model.norm.weight"], config.rms_norm_eps
        self.device, self._dtype = self.embedding.device, self.embedding.dtype
        group = config.num_attention_heads // config.num_key_value_heads
        self._ops = operations(_rotations(module, cache.capacity, self._dtype), group)
        self.layers = [Layer(i, state, config, self._ops) for i in range(config.num_hidden_layers)]
        self.num_layers = len(self.layers)
        tied = config.tie_word_embeddings
        self.head = _stack(state, ["model.embed_tokens" if tied else "lm_head"])
        for index in range(
            len(cache.keys), len(self.layers)
        ):  # routes' drafts share a cache: the first one makes it
            self.layers[index].grow(cache)
        self._linears = [
            self.head,
            *(m for x in self.layers for m in (x.qkv, x.out, x.gate_up, x.down)),
        ]
        self.graphs = CudaGraphs.of(self._forward, cache.slots, cache.capacity, self.device)
        # What is not a matrix: norms, the embedding, and biases where the products read them.
        read = {name for linear in self._linears for name in (*linear.names, *linear.biases)} | {
            "lm_head.weight"
        }
        self._rest = {name: state[name] for name in sorted(state.keys() - read)}
        self._rest["model.embed_tokens.weight"] = self.embedding
        for linear in self._linears:
            self._rest |= linear.biases

    @torch.inference_mode()
    def forward(
        self,
        slots: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Tensor:
        ids_BT, starts_B = ids_BT.to(self.device), starts_B.to(self.device)
        if self.graphs is not None and self.graphs.take(slots, ids_BT):
            return self.graphs.forward(ids_BT, starts_B, upto, tree)
        return self._forward(slots, ids_BT, starts_B, upto, tree)

    @torch.inference_mode()
    def encode(self, slots: Slots, ids_BT: Tensor, starts_B: Tensor, upto: int) -> None:
        self._run(slots, ids_BT.to(self.device), starts_B.to(self.device), upto)

    # ── layer by layer ──

    def embed(self, ids_BT: Tensor) -> HiddenStates:
        return HiddenStates(F.embedding(ids_BT, self.embedding).float(), None)

    @torch.inference_mode()
    def run_layer(
        self, slots: Slots, hidden: HiddenStates, starts_B: Tensor, upto: int, layer: int
    ) -> HiddenStates:
        place = self._ops.place(slots, starts_B, hidden.count, min(upto, self.cache.capacity))
        x_NE, y_NE = self._padded(hidden)
        y_NE = self.layers[layer](x_NE, y_NE, place, self.cache)
        count, shape = hidden.numel(), hidden.residual_BTE.shape
        residual_BTE = x_NE[:count].view(shape).clone()
        return HiddenStates(residual_BTE, y_NE[:count].view(shape).clone())

    @torch.inference_mode()
    def exit_logits(self, hidden: HiddenStates) -> Tensor:
        x_NE, y_NE = self._padded(hidden)
        # The norm writes into x, which the caller goes on with.
        normed_NE = self._ops.add_norm(x_NE.clone(), y_NE, self.norm, self.eps)
        logits_NV = self.head(normed_NE)[: hidden.numel()]
        B, T, _ = hidden.residual_BTE.shape
        return fit_vocabulary(logits_NV.view(B, T, -1), self.vocab_size)

    def _padded(self, hidden: HiddenStates) -> tuple[Tensor, Tensor | None]:
        """The residual stream and the last layer's output, flattened and padded."""
        tokens = padded(hidden.numel(), self.embedding)
        x_NE = _pad(hidden.residual_BTE.flatten(0, 1).contiguous(), tokens)
        if hidden.update_BTE is None:
            return x_NE, None
        return x_NE, _pad(hidden.update_BTE.flatten(0, 1).contiguous(), tokens)

    def keep_path(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        self.cache.keep_path(slot, start, nodes)

    def copy(self, source: int, destination: int, length: int) -> None:
        self.cache.copy(source, destination, length)

    def _forward(
        self,
        slots: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Tensor:
        x_NE, y_NE = self._run(slots, ids_BT, starts_B, upto, tree)
        logits_NV = self.head(self._ops.add_norm(x_NE, y_NE, self.norm, self.eps))[: ids_BT.numel()]
        return fit_vocabulary(logits_NV.view(*ids_BT.shape, -1), self.vocab_size)

    def _run(
        self,
        slots: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        tree: TreePositions | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream, and what the last layer adds to it."""
        upto = min(
            upto, self.cache.capacity
        )  # sequences near their end draft along with others that go further
        place = self._ops.place(slots, starts_B, ids_BT.shape[1], upto, tree)
        x_NE, y_NE = F.embedding(ids_BT.flatten(), self.embedding).float(), None
        x_NE = _pad(x_NE, padded(len(x_NE), self.embedding))
        for layer in self.layers:
            y_NE = layer(x_NE, y_NE, place, self.cache)
        return x_NE, y_NE

    # ── weights ──

    def weights(self) -> dict[str, Tensor]:
        """All weights by their Hugging Face names, tied ones once, as they are in use."""
        return {
            name: tensor for linear in self._linears for name, tensor in linear.weights().items()
        } | self._rest

    def prepare(self, weights: Mapping[str, Tensor]) -> "Staged":
        """Lays other weights out beside the live ones. Any thread may call it."""
        ready = {name: tensor.to(self.device, self._dtype) for name, tensor in weights.items()}
        return Staged(
            [linear.pack([ready[name] for name in linear.names]) for linear in self._linears],
            {name: ready[name] for name in self._rest},
        )

    def install(self, staged: "Staged") -> bool:
        """Puts prepared weights in place; whether the device now holds them. Only between two steps."""
        for linear, packed in zip(self._linears, staged.packed, strict=True):
            linear.install(packed)
        for name, tensor in staged.rest.items():
            self._rest[name].copy_(tensor)
        held = all(
            linear.holds(packed)
            for linear, packed in zip(self._linears, staged.packed, strict=True)
        )
        return held and all(
            torch.equal(self._rest[name], tensor) for name, tensor in staged.rest.items()
        )


@dataclass(frozen=True, slots=True)
class Staged:
    packed: list[Tensor]
    rest: dict[str, Tensor]


def _stack(state: Mapping[str, Tensor], names: list[str]) -> Linear:
    def named(kind: str) -> dict[str, Tensor]:
        return {
            f"{name}.{kind}": state[f"{name}.{kind}"] for name in names if f"{name}.{kind}" in state
        }

    return Linear(named("weight"), named("bias"))


def _pad(x_NE: Tensor, tokens: int) -> Tensor:
    return F.pad(x_NE, (0, 0, 0, tokens - len(x_NE))) if tokens > len(x_NE) else x_NE


def _rotations(module: nn.Module, capacity: int, dtype: torch.dtype) -> Rotations:
    """As `transformers` has them."""
    rotary: Any = module.get_submodule("model.rotary_emb")
    angles_LD = (
        torch.arange(capacity, device=rotary.inv_freq.device)[:, None] * rotary.inv_freq.float()
    ).repeat(1, 2)
    scale = rotary.attention_scaling
    return (angles_LD.cos() * scale).to(dtype), (angles_LD.sin() * scale).to(dtype)
