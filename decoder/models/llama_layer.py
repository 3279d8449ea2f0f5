"""One layer of the Llama family, over slot caches.

Query, key and value projections are one product, and so are gate and up. Keys and values are
written in place. Query heads that share a key-value head are further rows of one attention.

Legend: M tokens of one forward, flattened with padding; E hidden size, B sequences, T new tokens of
a sequence, U visible positions, H query heads, K key-value heads, A = T × H / K attention rows of
a key-value head, D head size, L capacity.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from decoder.models.kv_cache import KVCache
from decoder.models.linear import Linear
from decoder.models.ops import HeadNorms, Operations, Positions, Rotations


class LlamaLayer:
    """Attention and MLP; works on the residual stream and the previous layer's output."""

    def __init__(
        self, index: int, state: Mapping[str, Tensor], config: PretrainedConfig, ops: Operations
    ) -> None:
        prefix = f"model.layers.{index}."
        self.index, self.eps, self.ops = index, config.rms_norm_eps, ops
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv = stacked_linear(state, [f"{prefix}self_attn.{name}_proj" for name in "qkv"])
        self.out = stacked_linear(state, [f"{prefix}self_attn.o_proj"])
        self.gate_up = stacked_linear(
            state, [f"{prefix}mlp.{name}_proj" for name in ("gate", "up")]
        )
        self.down = stacked_linear(state, [f"{prefix}mlp.down_proj"])
        self.norm = state[f"{prefix}input_layernorm.weight"]
        self.mlp_norm = state[f"{prefix}post_attention_layernorm.weight"]
        q_norm = state.get(f"{prefix}self_attn.q_norm.weight")
        k_norm = state.get(f"{prefix}self_attn.k_norm.weight")
        self.head_norms = HeadNorms(q_norm, k_norm, self.eps)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def add_to(self, cache: KVCache) -> None:
        """Allocates this layer's part of the cache."""
        head_size = sum(self.qkv.sizes) // (self.heads + 2 * self.kv_heads)
        cache.add_layer(self.kv_heads, head_size, self.norm.dtype, self.norm.device)

    def __call__(
        self, x_ME: Tensor, y_ME: Tensor | None, positions: Positions, cache: KVCache
    ) -> Tensor:
        """Adds y, the previous layer's output, to the residual stream x in place.

        Returns this layer's output, which is not yet added.
        """
        normed_ME = self.ops.add_norm(x_ME, y_ME, self.norm, self.eps)
        y_ME = self._attention(normed_ME, positions, cache)
        normed_ME = self.ops.add_norm(x_ME, y_ME, self.mlp_norm, self.eps)
        return self.down(self.ops.swiglu(self.gate_up(normed_ME)))

    def _attention(self, x_ME: Tensor, positions: Positions, cache: KVCache) -> Tensor:
        q_BKAD = self.ops.rotate(
            self.qkv(x_ME), self.heads, positions, self.head_norms, cache, self.index
        )
        keys_BKUD, values_BKUD = cache.read(self.index, positions.slots, positions.upto)
        y_BKAD = functional.scaled_dot_product_attention(
            q_BKAD, keys_BKUD, values_BKUD, positions.bias_B1AU
        )
        (B, K, A, D), T = q_BKAD.shape, positions.tokens
        y_BTKGD = y_BKAD.view(B, K, A // T, T, D).permute(0, 3, 1, 2, 4)
        return self.out(pad_tokens(y_BTKGD.reshape(B * T, -1), len(x_ME)))


def stacked_linear(state: Mapping[str, Tensor], names: list[str]) -> Linear:
    """The named projections as one product; biases where they have them."""
    weights = {f"{name}.weight": state[f"{name}.weight"] for name in names}
    biases = {f"{name}.bias": state[f"{name}.bias"] for name in names if f"{name}.bias" in state}
    return Linear(weights, biases)


def pad_tokens(x_ME: Tensor, tokens: int) -> Tensor:
    """Appends zero rows up to a number of tokens."""
    missing = tokens - len(x_ME)
    return functional.pad(x_ME, (0, 0, 0, missing)) if missing > 0 else x_ME


def rotations(module: nn.Module, capacity: int, dtype: torch.dtype) -> Rotations:
    """Cosines and sines of the rotary positions, as `transformers` computes them."""
    rotary: Any = module.get_submodule("model.rotary_emb")
    positions_L = torch.arange(capacity, device=rotary.inv_freq.device)
    angles_LD = (positions_L[:, None] * rotary.inv_freq.float()).repeat(1, 2)
    scale = rotary.attention_scaling
    return (angles_LD.cos() * scale).to(dtype), (angles_LD.sin() * scale).to(dtype)
