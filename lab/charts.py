"""The demo's chart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.traffic import Served

WINDOW = 50  # requests that a point of a curve averages over
FIRST, LEARNT, LIVE = "#9aa5b1", "#2a9d5c", "#2563c4"


@dataclass(frozen=True)
class LearningCurve:
    """Live traffic in the order of its answers, and held-out figures before and after it."""

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
        """(version, its first request, the first request without older versions) of each swap.

        Between the two requests the version is a canary. The first version is left out.
        """
        newest, found = self.newest, []
        for version in sorted(set(newest) - {0})[1:]:
            older = [i for i, other in enumerate(newest) if other < version]
            found.append((version, newest.index(version), max(older, default=-1) + 1))
        return found

    @property
    def swaps(self) -> list[tuple[int, int]]:
        """(first request that it drafted alone, version) of every version that replaced another."""
        newest = self.newest
        alone = [(at, version) for version, _, at in self.trials if at < len(newest)]
        return [(at, version) for at, version in alone if newest[at] == version]


def new_figure(width: float, height: float) -> Any:
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(curve: LearningCurve, path: Path) -> Path:
    """τ and acceptance of live traffic, swaps marked; on the right the held-out queries."""
    figure = new_figure(10, 6.2)
    grid = figure.subplots(2, 2, width_ratios=[4.2, 1], sharex="col", sharey="row")
    tau = [(answer.tokens, answer.steps) for answer in curve.served]
    # A request that compared nothing has no overlap and no weight.
    overlaps = [answer.overlap for answer in curve.served]
    overlap = [(0.0, 0.0) if each is None else (each, 1.0) for each in overlaps]
    _panels(*grid[0], curve, tau, (curve.tau_before, curve.tau_after))
    _panels(*grid[1], curve, overlap, (curve.acceptance_before, curve.acceptance_after))
    grid[0][0].set_ylabel("tokens per target forward, τ")
    grid[1][0].set_ylabel("acceptance rate, Σ min(p, q)")
    grid[1][0].set_xlabel("requests served")
    title = f"live traffic, mean over {WINDOW} requests; shaded: a canary; dashed: a swap"
    grid[0][0].set_title(title, fontsize=10)
    grid[0][1].set_title("held-out queries", fontsize=10)
    for request, version in curve.swaps:
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        style = {"color": LEARNT, "fontsize": 9}
        grid[0][0].annotate(f"v{version}", (request, 1), xytext=(3, -12), **where, **style)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _panels(
    live: Any,
    ends: Any,
    curve: LearningCurve,
    pairs: Sequence[tuple[float, float]],
    held_out: tuple[float, float],
) -> None:
    """One row of the chart: live traffic on the left, held-out queries on the right."""
    x, y = moving_ratio(pairs, WINDOW)
    live.plot(x, y, color=LIVE, linewidth=1.8)
    live.axhline(held_out[0], color=FIRST, linestyle=":", linewidth=1.4)
    for _, begun, alone in curve.trials:
        live.axvspan(begun, alone, color=LEARNT, alpha=0.08, linewidth=0)
    for request, _ in curve.swaps:
        live.axvline(request, color=LEARNT, linestyle="--", linewidth=1.1)
    ends.plot([0, 1], held_out, color=FIRST, linewidth=1)
    ends.scatter([0, 1], held_out, color=[FIRST, LEARNT], s=70, zorder=3)
    for at, value in enumerate(held_out):
        above = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
        ends.annotate(f"{value:.2f}", (at, value), **above)
    ends.set_xticks([0, 1], ["first draft", "learnt"])
    ends.set_xlim(-0.6, 1.6)
    bottom, top = np.nanmin([*y, *held_out]), np.nanmax([*y, *held_out])
    live.set_ylim(bottom - 0.12 * (top - bottom), top + 0.2 * (top - bottom))
    live.grid(alpha=0.25)
    ends.grid(alpha=0.25)


def moving_ratio(
    pairs: Sequence[tuple[float, float]], window: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Σ a / Σ b over the last `window` pairs, from a fifth of a window on; 0 / 0 is NaN."""
    sums = np.concatenate([[[0.0, 0.0]], np.cumsum(np.array(pairs, float), axis=0)])
    ends = np.arange(min(len(pairs), max(1, window // 5)), len(pairs) + 1)
    inside = sums[ends] - sums[np.maximum(0, ends - window)]
    with np.errstate(invalid="ignore"):
        return ends, inside[:, 0] / inside[:, 1]
