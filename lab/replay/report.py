"""The tables of a replay."""

from collections.abc import Mapping
from typing import Any

from lab.output import table
from lab.statistics import Estimate

HEAD = (
    *("domain", "τ before", "τ after", "ratio (95 %)", "sampled", "greedy", "acceptance"),
    *("wall, 1", "wall, n", "recovers in", "forgets"),
)


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
