"""The compiled operations of a Llama layer, against torch's operations."""

import math

import pytest
import torch

from decoder.models.kv_cache import KVCache, Slots, TreePositions
from decoder.models.ops import HeadNorms, Operations, Rotations, TorchOperations
from decoder.models.ops_cpu import FusedOperations
from decoder.verification.tree_shape import TreeShape

CAPACITY, HEADS, KV_HEADS, SIZE = 24, 6, 2, 16
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def both(dtype: torch.dtype) -> list[Operations]:
    angles = torch.randn(CAPACITY, SIZE // 2).repeat(1, 2)
    rotations: Rotations = (angles.cos().to(dtype), angles.sin().to(dtype))
    return [made(rotations, HEADS // KV_HEADS) for made in (TorchOperations, FusedOperations)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def agree(found: list[torch.Tensor], dtype: torch.dtype) -> None:
    torch.testing.assert_close(found[1], found[0], rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 80])
def test_norms_and_swiglu(dtype: torch.dtype, tokens: int) -> None:
    """Fused and torch operations agree, and leave the same residual stream."""
    x, y, weight = (
        torch.randn(tokens, 48),
        torch.randn(tokens, 48).to(dtype),
        torch.randn(48).to(dtype),
    )
    gate_up = (20 * torch.randn(tokens, 2 * 40)).to(dtype)
    streams = [x.clone(), x.clone()]
    normed = [
        ops.add_norm(s, y, weight, 1e-6).clone()
        for ops, s in zip(both(dtype), streams, strict=True)
    ]
    assert torch.equal(*streams), "the residual stream is float32 in both"
    agree(normed, dtype)
    agree([ops.add_norm(x, None, weight, 1e-6).clone() for ops in both(dtype)], dtype)
    agree([ops.swiglu(gate_up).clone() for ops in both(dtype)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True], ids=["bare", "head norms"])
@pytest.mark.parametrize(("slots", "tokens"), [(slice(0, 1), 1), (slice(1, 4), 3), ([0, 2, 3], 2)])
def test_rotated_heads_and_their_positions(
    dtype: torch.dtype, normed: bool, slots: Slots, tokens: int
) -> None:
    """Rotated queries agree, and so do the keys and values that both write into the cache."""
    count = slots.stop - slots.start if isinstance(slots, slice) else len(slots)
    starts = torch.tensor(
        [4, CAPACITY - 1, 9][:count]
    )  # the second one's tokens point past the end
    qkv = torch.randn(count * tokens, (HEADS + 2 * KV_HEADS) * SIZE).to(dtype)
    q_norm, k_norm = (torch.randn(SIZE).to(dtype) if normed else None for _ in "qk")
    seen: list[list[torch.Tensor]] = []
    for ops in both(dtype):
        cache = KVCache(4, CAPACITY)
        cache.add_layer(KV_HEADS, SIZE, dtype, torch.device("cpu"))
        positions = ops.positions(slots, starts, tokens, CAPACITY)
        q = ops.rotate(
            qkv.clone(), HEADS, positions, HeadNorms(q_norm, k_norm, 1e-6), cache, 0
        ).clone()
        # The last cell of a slot holds any of the tokens that pointed past the end.
        seen.append([q, cache.keys[0][:, :-1], cache.values[0][:, :-1]])
        if (
            count * tokens > 1
        ):  # a lone one sees all of a context that ends with it, and needs to be told nothing
            assert positions.bias_B1AU is not None
            seen[-1].append(positions.bias_B1AU)
    for pair in zip(*seen, strict=True):
        agree(list(pair), dtype)


@pytest.mark.parametrize("slots", [slice(1, 4), [0, 2, 3]], ids=["a view", "a copy"])
@pytest.mark.parametrize("first", [0, 2])
def test_positions_of_tree_nodes(slots: Slots, first: int) -> None:
    """Positions follow the depth, cells the order; nodes see the context and their ancestors."""
    shapes = [TreeShape((0, 0, 1, 1)), TreeShape((0, 1, 2, 0)), TreeShape((0, 0, 0, 3))]
    visible_BTC = torch.stack([shape.visible for shape in shapes])[:, first:]
    nodes = TreePositions(visible_BTC.sum(-1) - 1, visible_BTC)
    starts, tokens = (
        torch.tensor([4, 0, CAPACITY - 3]),
        5 - first,
    )  # the last one's nodes point past the end
    torch_ops, fused = both(torch.float32)
    biases = [
        ops.positions(slots, starts, tokens, 12, nodes).bias_B1AU for ops in (torch_ops, fused)
    ]
    assert torch.equal(*biases)
    qkv = torch.randn(3 * tokens, (HEADS + 2 * KV_HEADS) * SIZE)
    seen = []
    for ops in (torch_ops, fused):
        cache = KVCache(4, CAPACITY)
        cache.add_layer(KV_HEADS, SIZE, torch.float32, torch.device("cpu"))
        positions = ops.positions(slots, starts, tokens, 12, nodes)
        q = ops.rotate(qkv.clone(), HEADS, positions, HeadNorms(None, None, 1e-6), cache, 0).clone()
        seen.append([q[:2], cache.keys[0][:, :-1], cache.values[0][:, :-1]])
    for pair in zip(*seen, strict=True):
        agree(list(pair), torch.float32)


def test_nan_and_infinity_pass_through_swiglu() -> None:
    """A NaN stays NaN; large gate values saturate without overflow."""
    for dtype in DTYPES:
        gate_up = torch.tensor([[math.nan, -math.inf, 200.0, -200.0, 1.0, 1.0, 1.0, 1.0]]).to(dtype)
        for ops in both(dtype):
            nan, low, high, tiny = ops.swiglu(gate_up)[0].tolist()
            assert math.isnan(nan), "a broken model must not look sound"
            assert abs(tiny) < 1e-30, "far below zero the gate is almost closed"
            assert high == pytest.approx(200, rel=1e-2)
            assert not low > 0
