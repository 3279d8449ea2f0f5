"""A model's forward on CUDA, captured as graphs: one launch in place of hundreds.

For a few tokens the host takes longer to launch a layer's operations than the device to run them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoder.models.kv_cache import TreePositions

# Slots, ids [B, T], starts [B], upto → logits.
Forward = Callable[[Any, Tensor, Tensor, int, TreePositions | None], Tensor]
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


@dataclass(frozen=True, slots=True)
class _Captured:
    """The tensors that a graph reads, and a function that runs it."""

    ids: Tensor
    starts: Tensor
    tree: TreePositions | None
    replay: Callable[[], Tensor]


class CudaGraphs:
    """A forward as captured CUDA graphs, one for each shape of a ladder.

    The number of sequences is rounded up to a power of two and the context to the next rung, so
    that few graphs serve all steps. Padded sequences write to the last cell of their slots, which
    no context uses, and their logits are cut off. Graphs read weights and caches at addresses that
    never change, so a swap needs no new capture.
    """

    CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    TOKENS = 17  # most new tokens of a sequence: enough for a step, not for a prompt

    def __init__(
        self, forward: Forward, slots: int, capacity: int, device: torch.device, capture: Capture
    ) -> None:
        self._forward, self._capture = forward, capture
        self._slots, self._capacity, self._device = slots, capacity, device
        self._captured: dict[tuple[int, int, int, int], _Captured] = {}

    @classmethod
    def of(
        cls, forward: Forward, slots: int, capacity: int, device: torch.device
    ) -> "CudaGraphs | None":
        """None on other devices than CUDA."""
        if device.type != "cuda":
            return None
        return cls(forward, slots, capacity, device, capture_cuda())

    def serves(self, slots: Any, ids_BT: Tensor) -> bool:
        """Whether the slots are the first ones, with few new tokens each."""
        return isinstance(slots, slice) and slots.start == 0 and ids_BT.shape[1] <= self.TOKENS

    def forward(
        self, ids_BT: Tensor, starts_B: Tensor, upto: int, tree: TreePositions | None
    ) -> Tensor:
        (count, new), cells = ids_BT.shape, 0 if tree is None else tree.visible_BTC.shape[2]
        padded = min(1 << (count - 1).bit_length(), self._slots)
        rung = next((rung for rung in self.CONTEXTS if rung >= upto), self._capacity)
        key = padded, new, min(rung, self._capacity), cells
        if key not in self._captured:
            self._captured[key] = self._record(*key)
        held = self._captured[key]
        held.ids[:count].copy_(ids_BT)
        held.starts[:count].copy_(starts_B)
        held.starts[count:].fill_(self._capacity - 1)
        if tree is not None and held.tree is not None:
            held.tree.depth_BT[:count].copy_(tree.depth_BT)
            held.tree.visible_BTC[:count].copy_(tree.visible_BTC)
        return held.replay()[:count].clone()  # the next replay overwrites it

    def _record(self, count: int, new: int, context: int, cells: int) -> _Captured:
        ids = torch.zeros((count, new), dtype=torch.long, device=self._device)
        starts = torch.full((count,), self._capacity - 1, device=self._device)
        visible = torch.ones((count, new, cells), dtype=torch.bool, device=self._device)
        tree = TreePositions(torch.zeros_like(ids), visible) if cells else None
        slots = slice(0, count)
        replay = self._capture(lambda: self._forward(slots, ids, starts, context, tree))
        return _Captured(ids, starts, tree, replay)


def capture_cuda() -> Capture:
    """A function that records work on the device, and returns one that replays it.

    A replay reads whatever lies at the recorded addresses then.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries select kernels and allocate before recording
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: they stage a draft or wait for a download.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture
