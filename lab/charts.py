"""Charts: a figure that needs no display, and the demo's."""

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
    def trials(self) -> list[tuple[int, int, int]]:
        """(version, its first request, the first request without older versions) of each swap.

        Between the two requests the version is a canary. The first version is left out.
        """
        newest, found = self._newest, []
        for version in sorted(set(newest) - {0})[1:]:
            older = [i for i, other in enumerate(newest) if other < version]
            found.append((version, newest.index(version), max(older, default=-1) + 1))
        return found

    @property
    def swaps(self) -> list[tuple[int, int]]:
        """(first request that it drafted alone, version) of every version that replaced another."""
        newest = self._newest
        alone = [(at, version) for version, _, at in self.trials if at < len(newest)]
        return [(at, version) for at, version in alone if newest[at] == version]

    @property
    def _newest(self) -> list[int]:
        """The last version that drafted for each request."""
        return [answer.versions[-1] if answer.versions else 0 for answer in self.served]


def new_panels(count: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its panels, one below the other over the same requests."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(count, 1, sharex=True)


def finish_panel(panel: Any, name: str, swaps: Sequence[int]) -> None:
    """Names a panel, marks the swaps, and leaves room above the curves for its legend."""
    panel.set_ylabel(name)
    for at in swaps:
        panel.axvline(at, color=LEARNT, linestyle="--", linewidth=0.8, alpha=0.7)
    panel.grid(alpha=0.25)
    panel.legend(loc="upper left", fontsize=8, ncols=3)
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + 0.18 * (high - low))


def draw(curve: LearningCurve, path: Path) -> Path:
    """τ and acceptance of live traffic, swaps marked, between the held-out figures."""
    figure, panels = new_panels(2, 10, 6.2)
    tau = [(answer.tokens, answer.steps) for answer in curve.served]
    # A request that compared nothing has no overlap and no weight.
    overlaps = [answer.overlap for answer in curve.served]
    overlap = [(0.0, 0.0) if each is None else (each, 1.0) for each in overlaps]
    swaps = [at for at, _ in curve.swaps]
    _curves(panels[0], curve, tau, curve.tau_before, curve.tau_after)
    finish_panel(panels[0], "tokens per target forward, τ", swaps)
    _curves(panels[1], curve, overlap, curve.acceptance_before, curve.acceptance_after)
    finish_panel(panels[1], "acceptance rate, Σ min(p, q)", swaps)
    for request, version in curve.swaps:
        where = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 9}
        panels[0].annotate(f"v{version}", (request, 1.01), color=LEARNT, **where)
    panels[1].set_xlabel("requests served")
    title = f"live traffic, mean over {WINDOW} requests; shaded: a canary; dashed: a swap"
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _curves(
    panel: Any,
    curve: LearningCurve,
    pairs: Sequence[tuple[float, float]],
    before: float,
    after: float,
) -> None:
    x, y = moving_ratio(pairs, WINDOW)
    panel.plot(x, y, color=LIVE, linewidth=1.8, label="live traffic")
    for name, value, colour in (("first draft", before, FIRST), ("learnt", after, LEARNT)):
        label = f"{name}, held-out queries: {value:.2f}"
        panel.axhline(value, color=colour, linestyle=":", linewidth=1.4, label=label)
    for _, begun, alone in curve.trials:
        panel.axvspan(begun, alone, color=LEARNT, alpha=0.08, linewidth=0)


def moving_ratio(
    pairs: Sequence[tuple[float, float]], window: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Σ a / Σ b over the last `window` pairs, from a fifth of a window on; 0 / 0 is NaN."""
    sums = np.concatenate([[[0.0, 0.0]], np.cumsum(np.array(pairs, float), axis=0)])
    ends = np.arange(min(len(pairs), max(1, window // 5)), len(pairs) + 1)
    inside = sums[ends] - sums[np.maximum(0, ends - window)]
    with np.errstate(invalid="ignore"):
        return ends, inside[:, 0] / inside[:, 1]
