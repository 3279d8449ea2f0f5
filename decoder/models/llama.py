"""The Llama family's forward over slot caches: Llama, Mistral, Qwen2, Qwen3.

Computes the same numbers as `transformers`, and nothing twice. The residual stream is float32.
Products are `Linear`, everything between them is `Operations`.

Legend: B sequences, T new tokens of a sequence, M tokens of one forward, flattened with padding;
E hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from decoder.models.base import fit_vocabulary
from decoder.models.cuda_graphs import CudaGraphs
from decoder.models.hidden import HiddenStates
from decoder.models.kv_cache import KVCache, Slots, TreePositions
from decoder.models.linear import padded
from decoder.models.llama_layer import LlamaLayer, pad_tokens, rotations, stacked_linear
from decoder.models.llama_weights import EMBEDDING, LlamaWeights, Staged
from decoder.models.ops import operations

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
# Rotary scalings whose angles do not depend on the length of the context.
ROTATIONS = {"default", "linear", "llama3", "yarn"}


def supported(config: PretrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILIES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROTATIONS
    )


class Llama:
    """A `LayeredModel` and `ServedModel`."""

    def __init__(self, module: nn.Module, cache: KVCache, vocab_size: int) -> None:
        config: PretrainedConfig = module.config  # type: ignore[assignment]
        state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        self.vocab_size, self.mask_id, self.cache = vocab_size, int(config.pad_token_id or 0), cache
        self.embedding = state[EMBEDDING]
        self.norm, self.eps = state["model.norm.weight"], config.rms_norm_eps
        self.device, dtype = self.embedding.device, self.embedding.dtype
        group = config.num_attention_heads // config.num_key_value_heads
        self._ops = operations(rotations(module, cache.capacity, dtype), group)
        self.num_layers: int = config.num_hidden_layers
        self.layers = [LlamaLayer(i, state, config, self._ops) for i in range(self.num_layers)]
        tied = config.tie_word_embeddings
        self.head = stacked_linear(state, ["model.embed_tokens" if tied else "lm_head"])
        for layer in self.layers[len(cache.keys) :]:  # drafts that share a cache add layers once
            layer.add_to(cache)
        self.graphs = CudaGraphs.of(self._forward, cache.slots, cache.capacity, self.device)
        linears = [linear for layer in self.layers for linear in layer.linears]
        self._weights = LlamaWeights(state, [self.head, *linears])

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
        if self.graphs is not None and self.graphs.serves(slots, ids_BT):
            return self.graphs.forward(ids_BT, starts_B, upto, tree)
        return self._forward(slots, ids_BT, starts_B, upto, tree)

    @torch.inference_mode()
    def encode(self, slots: Slots, ids_BT: Tensor, starts_B: Tensor, upto: int) -> None:
        self._run(slots, ids_BT.to(self.device), starts_B.to(self.device), upto)

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
        x_ME, y_ME = self._run(slots, ids_BT, starts_B, upto, tree)
        return self._logits(x_ME, y_ME, *ids_BT.shape)

    def _run(
        self,
        slots: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        tree: TreePositions | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream, and the last layer's output, which is not yet added."""
        # Sequences near their end draft along with others, beyond the capacity.
        upto = min(upto, self.cache.capacity)
        positions = self._ops.positions(slots, starts_B, ids_BT.shape[1], upto, tree)
        x_ME, y_ME = functional.embedding(ids_BT.flatten(), self.embedding).float(), None
        x_ME = pad_tokens(x_ME, padded(len(x_ME), self.embedding))
        for layer in self.layers:
            y_ME = layer(x_ME, y_ME, positions, self.cache)
        return x_ME, y_ME

    def _logits(self, x_ME: Tensor, y_ME: Tensor | None, B: int, T: int) -> Tensor:
        normed_ME = self._ops.add_norm(x_ME, y_ME, self.norm, self.eps)
        logits_MV = self.head(normed_ME)[: B * T]
        return fit_vocabulary(logits_MV.view(B, T, -1), self.vocab_size)

    # ── layer by layer ──

    def embed(self, ids_BT: Tensor) -> HiddenStates:
        return HiddenStates(functional.embedding(ids_BT, self.embedding).float(), None)

    @torch.inference_mode()
    def run_layer(
        self, slots: Slots, hidden: HiddenStates, starts_B: Tensor, upto: int, layer: int
    ) -> HiddenStates:
        upto = min(upto, self.cache.capacity)
        positions = self._ops.positions(slots, starts_B, hidden.count, upto)
        x_ME, y_ME = self._flattened(hidden)
        y_ME = self.layers[layer](x_ME, y_ME, positions, self.cache)
        count, shape = hidden.numel(), hidden.residual_BTE.shape
        residual_BTE = x_ME[:count].view(shape).clone()
        return HiddenStates(residual_BTE, y_ME[:count].view(shape).clone())

    @torch.inference_mode()
    def exit_logits(self, hidden: HiddenStates) -> Tensor:
        x_ME, y_ME = self._flattened(hidden)
        B, T, _ = hidden.residual_BTE.shape
        # The norm adds y to x, which the caller goes on with.
        return self._logits(x_ME.clone(), y_ME, B, T)

    def _flattened(self, hidden: HiddenStates) -> tuple[Tensor, Tensor | None]:
        """The residual stream and the last layer's output, [M, E] each."""
        tokens = padded(hidden.numel(), self.embedding)
        x_ME = pad_tokens(hidden.residual_BTE.flatten(0, 1).contiguous(), tokens)
        if hidden.update_BTE is None:
            return x_ME, None
        return x_ME, pad_tokens(hidden.update_BTE.flatten(0, 1).contiguous(), tokens)

    # ── weights ──

    def weights(self) -> dict[str, Tensor]:
        return self._weights.read()

    def prepare(self, weights: Mapping[str, Tensor]) -> Staged:
        return self._weights.prepare(weights)

    def install(self, staged: Staged) -> bool:
        return self._weights.install(staged)
