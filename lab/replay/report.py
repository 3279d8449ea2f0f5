"""What a replay shows: a table, a chart, and one HTML file that holds both."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.charts import FIRST, LEARNT, LIVE
from lab.replay.config import Replay, stretches
from lab.replay.figures import Logs, compared, cost, live, summarise

COLOURS = (LIVE, "#c2571a", "#7b3fb5", "#0f8b8d", "#b23a6f")
SMOOTH = 3  # looks that a point of a live curve averages over
STYLE = """<style>
body { font: 15px sans-serif; margin: 2em; max-width: 75em }
table { margin-bottom: 1.5em }
td, th { padding: .2em .8em; text-align: right }
tr:nth-child(even) { background: #f3f5f7 }
</style>
"""
COLUMNS = (
    ("domain", 10, "{}"),
    ("τ before", 9, "{:.2f}"),
    ("τ after", 8, "{:.2f}"),
    ("ratio (95 %)", 20, "{}"),
    ("sampled", 8, "{:.2f}"),
    ("greedy", 7, "{:.2f}"),
    ("acceptance", 16, "{}"),
    ("wall, 1", 9, "{}"),
    ("wall, n", 9, "{}"),
    ("recovers in", 12, "{}"),
    ("forgets", 8, "{}"),
)
DRAFTERS = (
    ("domain", 10, "{}"),
    ("drafter", 16, "{}"),
    ("at once", 7, "{}"),
    ("τ", 5, "{:.2f}"),
    ("verified", 8, "{:.2f}"),  # tokens, for one emitted
    ("over the chain", 20, "{}"),
    ("over plain", 20, "{}"),
)
Columns = Sequence[tuple[str, int, str]]


def figures(config: Replay, arms: Mapping[str, Logs]) -> dict[str, Any]:
    """Everything for the last line of JSON; the first arm's domains stand at the top."""
    first, *others = arms
    found: dict[str, Any] = {"domains": summarise(config, arms[first]), "seeds": len(config.seeds)}
    found["arms"] = {name: summarise(config, arms[name]) for name in others}
    found["over"] = {
        name: {
            domain: compared(arms[first], arms[name], domain, part.end, config.held_out)
            for part in stretches(config)
            for domain in part.domains
        }
        for name in others
    }
    found["train_s_by_tenth"] = cost(
        config, arms[first]
    )  # of one seed, on average; what follows is of all
    cycles = [event for log in arms[first].values() for event in log.of("cycle")]
    found["cycles"], found["train_s"] = len(cycles), sum(event["train_s"] for event in cycles)
    found["swaps"] = sum(event["state"] == "promoted" for event in cycles)
    return found


def rows(domains: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    found = []
    for name, f in domains.items():
        walls = [
            key
            for key in f
            if key.startswith("wall_ratio_") and key.removeprefix("wall_ratio_").isdigit()
        ]
        values = (
            name,
            f["tau_before"],
            f["tau_after"],
            _spread([f["tau_ratio"], f["tau_ratio_low"], f["tau_ratio_high"]]),
            f["sampled_tau_ratio"],
            f["greedy_tau_ratio"],
            f"{f['acceptance_before']:.3f} → {f['acceptance_after']:.3f}",
            f"{f['wall_ratio']:.2f}" if "wall_ratio" in f else "-",
            f"{f[walls[0]]:.2f}" if walls else "-",
            _recovery(f["queries_to_recover"], f["seeds_not_recovered"]),
            "-" if f["forgetting"] is None else f"{f['forgetting']:.1%}",
        )
        found.append(_row(COLUMNS, values))
    return found


def drafters(domains: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """What drafts how well for the drafts that were live at the end, in tokens per second over their best chain."""
    found = []
    for domain, f in domains.items():
        for key in (key for key in f if key.split("_")[0] == "drafters"):
            for name, told in f[key].items():
                over = (_spread(told[f"tokens_per_s_vs_{other}"]) for other in ("chain", "plain"))
                at_once = key.partition("_")[2] or "1"
                values = (domain, name, at_once, told["tau"], told["verified_per_token"], *over)
                found.append(_row(DRAFTERS, values))
    return sorted(found, key=lambda row: (list(domains).index(row[0]), int(row[2])))


def _row(columns: Columns, values: Sequence[Any]) -> list[str]:
    return [shape.format(value) for (_, _, shape), value in zip(columns, values, strict=True)]


def _spread(ratio: Sequence[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


def _recovery(queries: float | None, seeds_not_recovered: int) -> str:
    if queries is None:
        return "never" if seeds_not_recovered else "-"
    return f"{queries:.0f}"


def table(domains: Mapping[str, Mapping[str, Any]]) -> str:
    parts = [_table(COLUMNS, rows(domains))]
    if ways := drafters(domains):
        parts.append(_table(DRAFTERS, ways))
    return "\n\n".join(parts)


def _table(columns: Columns, lines: Sequence[Sequence[str]]) -> str:
    names, widths = [name for name, _, _ in columns], [width for _, width, _ in columns]
    return "\n".join(
        "  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True))
        for line in [names, *lines]
    )


def draw(config: Replay, arms: Mapping[str, Logs], path: Path) -> Path:
    """Along the stream: τ and acceptance of live traffic under every arm and the frozen draft; held-out τ by domain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    first = next(iter(arms.values()))
    labels = {"tau": "expected tokens per step, τ", "acceptance": "acceptance Σ min(p, q)"}
    for panel, (what, label) in zip(panels, labels.items(), strict=False):
        at, mean, _ = live(first, f"frozen_{what}")
        panel.plot(
            at,
            _smooth(mean),
            color=FIRST,
            linestyle=":",
            linewidth=1.6,
            label="first draft, frozen",
        )
        for (name, logs), colour in zip(arms.items(), COLOURS, strict=False):
            at, mean, each = live(logs, f"live_{what}")
            panel.plot(at, _smooth(mean), color=colour, linewidth=1.8, label=name)
            panel.fill_between(
                at,
                _smooth(each.min(0)),
                _smooth(each.max(0)),
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        panel.set_ylabel(label)
    panels[0].axhline(1, color="#444444", linewidth=0.8, label="no speculation")
    log = next(iter(first.values()))
    for domain, colour in zip(config.domains, COLOURS, strict=False):
        points = [(0, log.of("first")[0]["domains"][domain]["tau"])]
        points += [(event["at"], event["domains"][domain]["tau"]) for event in log.of("swap")]
        x, y = zip(*points, (config.queries, points[-1][1]), strict=True)
        panels[2].step(x, y, where="post", color=colour, linewidth=1.6, label=domain)
    panels[2].set_ylabel("τ on held-out queries,\nfirst arm and seed")
    panels[2].set_xlabel("queries served")
    for panel in panels:
        for event in log.of("swap"):
            panel.axvline(event["at"], color=LEARNT, linestyle="--", linewidth=0.6, alpha=0.7)
        for i, part in enumerate(stretches(config)):
            panel.axvspan(part.start, part.end, color="#000000", alpha=0.04 * (i % 2), linewidth=0)
        panel.grid(alpha=0.25)
        panel.legend(loc="upper left", fontsize=8, ncols=3)
        low, high = panel.get_ylim()
        panel.set_ylim(low, high + 0.18 * (high - low))
    for part in stretches(config):
        name = " → ".join(part.domains) if part.fade or len(part.domains) == 1 else "mixed"
        panels[0].annotate(
            name,
            ((part.start + part.end) / 2, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
        )
    figure.suptitle(
        f"seeds: {len(config.seeds)}; dashed: a draft is swapped in (first seed)", fontsize=10
    )
    figure.savefig(path, dpi=120)
    return path


def write_html(
    config: Replay, found: Mapping[str, Any], chart: Path, path: Path, title: str
) -> Path:
    """One file, with nothing to fetch."""
    parts = [f"<h1>{html.escape(title)}</h1>", _html_tables(found["domains"])]
    parts += [
        f"<h2>{html.escape(name)}</h2>{_html_tables(domains)}"
        for name, domains in found["arms"].items()
    ]
    image = base64.b64encode(chart.read_bytes()).decode()
    parts.append(
        f'<p><img alt="along the stream" style="max-width:100%" src="data:image/png;base64,{image}"></p>'
    )
    for name, part in (("Figures", dict(found)), ("Configuration", config.model_dump())):
        told = html.escape(json.dumps(part, indent=1))
        parts.append(f"<details><summary>{name}</summary><pre>{told}</pre></details>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>{STYLE}"
    path.write_text(head + "\n".join(parts) + "</html>\n")
    return path


def _html_tables(domains: Mapping[str, Mapping[str, Any]]) -> str:
    ways = drafters(domains)
    return _html_table(COLUMNS, rows(domains)) + (_html_table(DRAFTERS, ways) if ways else "")


def _html_table(columns: Columns, lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _, _ in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>"
        for line in lines
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _smooth(values: Any) -> list[float]:
    windows = [values[max(0, end - SMOOTH) : end] for end in range(1, len(values) + 1)]
    return [float(sum(window) / len(window)) for window in windows]
