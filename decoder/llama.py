"""The Llama family's forward over slot caches: Llama, Mistral, Qwen2, Qwen3.

The same numbers as `transformers`, with nothing computed twice: query, key and value projections are one product, so
are gate and up; keys and values are written in place; the query heads that share a key-value head are further positions
of one attention, not copies of it. The residual stream is float32.

Legend: B rows, T new tokens, N = B × T and padding, U visible positions, E hidden size, H query heads, K key-value
heads, G = H / K, D head size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from decoder.device import Graphs, Linear, padded, rms_norm
from decoder.sampling import fit_vocabulary
from decoder.slots import Rows, SlotCache, slot_index

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
ROTATIONS = {"default", "linear", "llama3", "yarn"}  # those whose angles do not depend on the context's length


def supported(config: PretrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILIES and config.hidden_act == "silu" and rope.get("rope_type", "default") in ROTATIONS
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a forward's tokens stand: the same for every layer."""

    rows: slice | Tensor
    upto: int
    padding: int  # tokens behind the last one, which only products see
    cells_N: Tensor  # where keys and values are written
    cos_BT1D: Tensor
    sin_BT1D: Tensor
    bias_B1QU: Tensor | None  # Q = G × T: 0 where a position is visible, -inf where not; None: all are


class Layer:
    def __init__(self, index: int, state: Mapping[str, Tensor], config: PretrainedConfig) -> None:
        at = f"model.layers.{index}."
        self.index, self.eps = index, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv = _stack(state, [f"{at}self_attn.{name}_proj" for name in "qkv"])
        self.out = _stack(state, [f"{at}self_attn.o_proj"])
        self.gate_up = _stack(state, [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"])
        self.down = _stack(state, [f"{at}mlp.down_proj"])
        self.norm = state[f"{at}input_layernorm.weight"]
        self.mlp_norm = state[f"{at}post_attention_layernorm.weight"]
        self.q_norm = state.get(f"{at}self_attn.q_norm.weight")
        self.k_norm = state.get(f"{at}self_attn.k_norm.weight")

    def grow(self, cache: SlotCache) -> None:
        """Adds this layer to the cache."""
        cache.grow(
            self.kv_heads, sum(self.qkv.sizes) // (self.heads + 2 * self.kv_heads), self.norm.dtype, self.norm.device
        )

    def __call__(self, x_NE: Tensor, place: Place, cache: SlotCache) -> Tensor:
        x_NE = x_NE + self._attention(rms_norm(x_NE, self.norm, self.eps), place, cache)
        gate, up = self.gate_up(rms_norm(x_NE, self.mlp_norm, self.eps)).chunk(2, -1)
        return x_NE + self.down(F.silu(gate) * up)

    def _attention(self, x_NE: Tensor, place: Place, cache: SlotCache) -> Tensor:
        B, T = place.cos_BT1D.shape[:2]
        H, K = self.heads, self.kv_heads
        qkv = self.qkv(x_NE)[: B * T].view(B, T, H + 2 * K, -1)
        qk, v_BTKD = qkv[:, :, : H + K], qkv[:, :, H + K :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk[:, :, :H].float(), qk[:, :, H:].float()
            qk = torch.cat([rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)], 2)
        qk = _rotate(qk, place)
        cache.write(self.index, place.cells_N, qk[:, :, H:].flatten(0, 1), v_BTKD.flatten(0, 1))
        keys_BUKD, values_BUKD = cache.read(self.index, place.rows, place.upto)
        q_BKQD = qk[:, :, :H].view(B, T, K, H // K, -1).permute(0, 2, 3, 1, 4).reshape(B, K, H // K * T, -1)
        y_BKQD = F.scaled_dot_product_attention(
            q_BKQD, keys_BUKD.transpose(1, 2), values_BUKD.transpose(1, 2), place.bias_B1QU
        )
        y = y_BKQD.view(B, K, H // K, T, -1).permute(0, 3, 1, 2, 4).reshape(B * T, -1)
        return self.out(F.pad(y, (0, 0, 0, place.padding)) if place.padding else y)


class Llama:
    """A `LanguageModel`, and `Weighted`: its weights can be replaced while it serves."""

    def __init__(self, module: nn.Module, cache: SlotCache, vocab_size: int) -> None:
        config: PretrainedConfig = module.config  # type: ignore[assignment]
        state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        self.vocab_size, self.cache = vocab_size, cache
        self.layers = [Layer(i, state, config) for i in range(config.num_hidden_layers)]
        self.embedding = state["model.embed_tokens.weight"]
        self.norm, self.eps = state["model.norm.weight"], config.rms_norm_eps
        tied = config.tie_word_embeddings
        self.head = _stack(state, ["model.embed_tokens" if tied else "lm_head"])
        for index in range(len(cache.keys), len(self.layers)):  # routes' drafts share a cache: the first one makes it
            self.layers[index].grow(cache)
        self._group = config.num_attention_heads // config.num_key_value_heads
        self.device, self._dtype = self.embedding.device, self.embedding.dtype
        self._steps = torch.arange(cache.capacity, device=self.device)
        self._cos, self._sin = _rotations(module, self._steps, self._dtype)
        self._linears = [self.head, *(m for x in self.layers for m in (x.qkv, x.out, x.gate_up, x.down))]
        self.graphs = Graphs.of(self._forward, cache.slots, cache.capacity, self.device)
        # What is not a matrix: norms, the embedding, and biases where the products read them.
        read = {name for linear in self._linears for name in (*linear.names, *linear.biases)} | {"lm_head.weight"}
        self._rest = {name: state[name] for name in sorted(state.keys() - read)}
        self._rest["model.embed_tokens.weight"] = self.embedding
        for linear in self._linears:
            self._rest |= linear.biases

    @torch.inference_mode()
    def forward(self, rows: Rows, ids_BT: Tensor, starts_B: Tensor, upto: int) -> Tensor:
        ids_BT, starts_B = ids_BT.to(self.device), starts_B.to(self.device)
        if self.graphs is not None and self.graphs.take(rows, ids_BT):
            return self.graphs.forward(ids_BT, starts_B, upto)
        return self._forward(rows, ids_BT, starts_B, upto)

    @torch.inference_mode()
    def encode(self, rows: Rows, ids_BT: Tensor, starts_B: Tensor, upto: int) -> None:
        self._run(rows, ids_BT.to(self.device), starts_B.to(self.device), upto)

    def copy(self, source: int, destination: int, length: int) -> None:
        self.cache.copy(source, destination, length)

    def _forward(self, rows: Rows, ids_BT: Tensor, starts_B: Tensor, upto: int) -> Tensor:
        x_NE = self._run(rows, ids_BT, starts_B, upto)
        logits_NV = self.head(rms_norm(x_NE, self.norm, self.eps))[: ids_BT.numel()]
        return fit_vocabulary(logits_NV.view(*ids_BT.shape, -1), self.vocab_size)

    def _run(self, rows: Rows, ids_BT: Tensor, starts_B: Tensor, upto: int) -> Tensor:
        place = self._place(rows, ids_BT.shape[1], starts_B, upto)
        x_NE = F.embedding(ids_BT.flatten(), self.embedding).float()
        if place.padding:
            x_NE = F.pad(x_NE, (0, 0, 0, place.padding))
        for layer in self.layers:
            x_NE = layer(x_NE, place, self.cache)
        return x_NE

    def _place(self, rows: Rows, new: int, starts_B: Tensor, upto: int) -> Place:
        # Padding of short rows may point past the end: the last cell belongs to nobody.
        positions_BT = (starts_B[:, None] + self._steps[:new]).clamp_(max=self.cache.capacity - 1)
        slots_B = slot_index(rows, self.device)
        cells_BT = slots_B[:, None] * self.cache.capacity + positions_BT
        bias = None
        if new > 1 or len(slots_B) > 1:
            hidden_BTU = self._steps[:upto] > positions_BT.repeat(1, self._group)[..., None]
            bias = torch.zeros(hidden_BTU.shape, dtype=self._dtype, device=self.device)
            bias = bias.masked_fill_(hidden_BTU, -torch.inf)[:, None]
        cos, sin = self._cos[positions_BT][:, :, None], self._sin[positions_BT][:, :, None]
        padding = padded(cells_BT.numel(), self.embedding) - cells_BT.numel()
        return Place(rows if isinstance(rows, slice) else slots_B, upto, padding, cells_BT.flatten(), cos, sin, bias)

    # ── weights ──

    def weights(self) -> dict[str, Tensor]:
        """All weights by their Hugging Face names, tied ones once, as they are in use."""
        return {name: tensor for linear in self._linears for name, tensor in linear.weights().items()} | self._rest

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
        held = all(linear.holds(packed) for linear, packed in zip(self._linears, staged.packed, strict=True))
        return held and all(torch.equal(self._rest[name], tensor) for name, tensor in staged.rest.items())


@dataclass(frozen=True, slots=True)
class Staged:
    packed: list[Tensor]
    rest: dict[str, Tensor]


def _stack(state: Mapping[str, Tensor], names: list[str]) -> Linear:
    def named(kind: str) -> dict[str, Tensor]:
        return {f"{name}.{kind}": state[f"{name}.{kind}"] for name in names if f"{name}.{kind}" in state}

    return Linear(named("weight"), named("bias"))


def _rotations(module: nn.Module, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, D] as `transformers` has them; the sines' first half is negated, for `_rotate`."""
    rotary: Any = module.get_submodule("model.rotary_emb")
    angles = positions[:, None].float() * rotary.inv_freq.float()
    cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def _rotate(x_BTHD: Tensor, place: Place) -> Tensor:
    """Rotary positions: the two halves of a head are the coordinates that turn."""
    swapped = x_BTHD.roll(x_BTHD.shape[-1] // 2, -1)
    return torch.addcmul(x_BTHD * place.cos_BT1D, swapped, place.sin_BT1D)
