"""The report of a replay: its tables, and the chart along the stream."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.charts import FIRST, LIVE, finish_panel, new_panels
from lab.output import table
from lab.replay.config import Replay, spans
from lab.replay.figures import live
from lab.replay.log import Log, Logs
from lab.statistics import Estimate

HEAD = (
    *("domain", "τ before", "τ after", "ratio (95 %)", "sampled", "greedy", "acceptance"),
    *("wall, 1", "wall, n", "recovers in", "forgets"),
)
COLOURS = (LIVE, "#c2571a", "#7b3fb5", "#0f8b8d", "#b23a6f")
NAMES = (
    "expected tokens per step, τ",
    "acceptance Σ min(p, q)",
    "τ on held-out queries,\nfirst arm and seed",
)
SMOOTH = 3  # chunks of traffic that a point of a live curve averages over


def show(title: str, domains: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what each domain gained."""
    table(HEAD, [_row(name, figures) for name, figures in domains.items()], title)


def _row(name: str, f: Mapping[str, Any]) -> list[str]:
    walls = [key for key in f if key.startswith("wall_ratio_") and key[-1].isdigit()]
    recovers = "never" if f["seeds_not_recovered"] else "-"
    if f["queries_to_recover"] is not None:
        recovers = f"{f['queries_to_recover']:.0f}"
    return [
        name,
        f"{f['tau_before']:.2f}",
        f"{f['tau_after']:.2f}",
        str(Estimate(f["tau_ratio"], f["tau_ratio_low"], f["tau_ratio_high"])),
        f"{f['sampled_tau_ratio']:.2f}",
        f"{f['greedy_tau_ratio']:.2f}",
        f"{f['acceptance_before']:.3f} → {f['acceptance_after']:.3f}",
        f"{f['wall_ratio']:.2f}" if "wall_ratio" in f else "-",
        f"{f[walls[0]]:.2f}" if walls else "-",
        recovers,
        "-" if f["forgetting"] is None else f"{f['forgetting']:.1%}",
    ]


def draw(config: Replay, arms: Mapping[str, Logs], path: Path) -> Path:
    """Live traffic under every arm and the frozen draft; below it held-out τ by domain."""
    figure, panels = new_panels(3, 11, 9)
    tau, acceptance, held_out = panels
    log = next(iter(next(iter(arms.values())).values()))
    _traffic(tau, arms, "tau")
    tau.axhline(1, color="#444444", linewidth=0.8, label="no speculation")
    _traffic(acceptance, arms, "acceptance")
    _held_out(held_out, config, log)
    held_out.set_xlabel("queries served")
    swaps = [event["at"] for event in log.of("swap")]
    for panel, name in zip(panels, NAMES, strict=True):
        for i, span in enumerate(spans(config)):
            panel.axvspan(span.start, span.end, color="#000000", alpha=0.04 * (i % 2), linewidth=0)
        finish_panel(panel, name, swaps)
    for span in spans(config):
        name = " → ".join(span.domains) if span.fade or len(span.domains) == 1 else "mixed"
        middle, above = ((span.start + span.end) / 2, 1.01), ("data", "axes fraction")
        tau.annotate(name, middle, xycoords=above, ha="center")
    title = f"seeds: {len(config.seeds)}; dashed: a draft is swapped in (first seed)"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    return path


def _traffic(panel: Any, arms: Mapping[str, Logs], what: str) -> None:
    """Every arm's mean over seeds and its range; the frozen draft of the first arm."""
    at, values = live(next(iter(arms.values())), f"frozen_{what}")
    style = {"color": FIRST, "linestyle": ":", "linewidth": 1.6}
    panel.plot(at, _smooth(values.mean(0)), label="first draft, frozen", **style)
    for (name, logs), colour in zip(arms.items(), COLOURS, strict=False):
        at, values = live(logs, f"live_{what}")
        low, high = _smooth(values.min(0)), _smooth(values.max(0))
        panel.plot(at, _smooth(values.mean(0)), color=colour, linewidth=1.8, label=name)
        panel.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _held_out(panel: Any, config: Replay, log: Log) -> None:
    events = [*log.of("first"), *log.of("swap")]
    for domain, colour in zip(config.domains, COLOURS, strict=False):
        tau = [event["domains"][domain]["tau"] for event in events]
        x, y = [*(event["at"] for event in events), config.queries], [*tau, tau[-1]]
        panel.step(x, y, where="post", color=colour, linewidth=1.6, label=domain)


def _smooth(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, end - SMOOTH) : end] for end in range(1, len(values) + 1)]
    return [float(sum(window) / len(window)) for window in windows]
