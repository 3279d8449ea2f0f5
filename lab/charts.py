"""Charts as PNG files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lab.traffic import Served

WINDOW = 50  # requests that a point of a curve averages over
FIRST, LEARNT, LIVE = "#9aa5b1", "#2a9d5c", "#2563c4"


@dataclass(frozen=True)
class LearningCurve:
    """A replay in the order of its answers, and the held-out queries' figures at either end."""

    served: Sequence[Served]
    tau_before: float
    tau_after: float
    acceptance_before: float
    acceptance_after: float

    @property
    def newest(self) -> list[int]:
        """The last version that drafted for each request."""
        return [answer.versions[-1] if answer.versions else 0 for answer in self.served]

    @property
    def trials(self) -> list[tuple[int, int, int]]:
        """(version, request from which on it drafted, and from which on no older one did), without the first version.

        In between it was a canary.
        """
        newest, found = self.newest, []
        for version in sorted(set(newest) - {0})[1:]:
            older = [i for i, other in enumerate(newest) if other < version]
            found.append((version, newest.index(version), max(older, default=-1) + 1))
        return found

    @property
    def swaps(self) -> list[tuple[int, int]]:
        """(request from which on it drafted alone, version) of every version that replaced another."""
        newest = self.newest
        return [
            (at, version)
            for version, _, at in self.trials
            if at < len(newest) and newest[at] == version
        ]


def draw(curve: LearningCurve, path: Path) -> Path:
    """τ and acceptance of live traffic over requests, every swap marked; beside it the held-out figures, same scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2, width_ratios=[4.2, 1], sharex="col", sharey="row")
    # A request that compared nothing has no overlap, and no weight.
    overlap = [(0.0, 0.0) if a.overlap is None else (a.overlap, 1.0) for a in curve.served]
    panels = [
        (
            "tokens per target forward, τ",
            [(a.tokens, a.steps) for a in curve.served],
            curve.tau_before,
            curve.tau_after,
        ),
        ("acceptance rate, Σ min(p, q)", overlap, curve.acceptance_before, curve.acceptance_after),
    ]
    for (live, ends), (name, pairs, before, after) in zip(grid, panels, strict=True):
        x, y = moving_ratio(pairs, WINDOW)
        live.plot(x, y, color=LIVE, linewidth=1.8)
        live.axhline(before, color=FIRST, linestyle=":", linewidth=1.4)
        live.set_ylabel(name)
        for _, begun, alone in curve.trials:
            live.axvspan(begun, alone, color=LEARNT, alpha=0.08, linewidth=0)
        for request, _ in curve.swaps:
            live.axvline(request, color=LEARNT, linestyle="--", linewidth=1.1)
        ends.plot([0, 1], [before, after], color=FIRST, linewidth=1)
        ends.scatter([0, 1], [before, after], color=[FIRST, LEARNT], s=70, zorder=3)
        for at, value in enumerate((before, after)):
            ends.annotate(
                f"{value:.2f}", (at, value), xytext=(0, 9), textcoords="offset points", ha="center"
            )
        ends.set_xticks([0, 1], ["first draft", "learnt"])
        ends.set_xlim(-0.6, 1.6)
        bottom, top = np.nanmin([*y, before, after]), np.nanmax([*y, before, after])
        live.set_ylim(bottom - 0.12 * (top - bottom), top + 0.2 * (top - bottom))
        for panel in (live, ends):
            panel.grid(alpha=0.25)
    for request, version in curve.swaps:
        grid[0][0].annotate(
            f"v{version}", (request, 1), xycoords=("data", "axes fraction"), xytext=(3, -12),
            textcoords="offset points", color=LEARNT, fontsize=9,
        )  # fmt: skip
    grid[0][0].set_title(
        f"live traffic, mean over {WINDOW} requests; shaded: a canary; dashed: a swap", fontsize=10
    )
    grid[0][1].set_title("held-out queries", fontsize=10)
    grid[1][0].set_xlabel("requests served")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def moving_ratio(
    pairs: Sequence[tuple[float, float]], window: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Σ a / Σ b over the last `window` pairs, from where a fifth of a window has been seen; NaN is 0 / 0."""
    sums = np.concatenate([[[0.0, 0.0]], np.cumsum(np.array(pairs, float), axis=0)])
    ends = np.arange(min(len(pairs), max(1, window // 5)), len(pairs) + 1)
    inside = sums[ends] - sums[np.maximum(0, ends - window)]
    with np.errstate(invalid="ignore"):
        return ends, inside[:, 0] / inside[:, 1]
