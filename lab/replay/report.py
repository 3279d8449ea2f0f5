"""The report of a replay: its tables, and one HTML file with the chart."""

import base64
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.output import table
from lab.replay.config import Replay
from lab.statistics import Estimate

STYLE = """<style>
body { font: 15px sans-serif; margin: 2em; max-width: 75em }
table { margin-bottom: 1.5em }
td, th { padding: .2em .8em; text-align: right }
tr:nth-child(even) { background: #f3f5f7 }
</style>
"""
GAIN = (
    *("domain", "τ before", "τ after", "ratio (95 %)", "sampled", "greedy", "acceptance"),
    *("wall, 1", "wall, n", "recovers in", "forgets"),
)
DRAFTERS = ("domain", "drafter", "at once", "τ", "verified", "over the chain", "over plain")
Domains = Mapping[str, Mapping[str, Any]]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # head, rows


def tables(domains: Domains) -> Iterator[Table]:
    """What each domain gained; how its drafters compare, where they were timed."""
    yield GAIN, [_gain(name, figures) for name, figures in domains.items()]
    if rows := list(_drafters(domains)):
        yield DRAFTERS, rows


def show(title: str, domains: Domains) -> None:
    for head, rows in tables(domains):
        table(head, rows, title)


def _gain(name: str, f: Mapping[str, Any]) -> list[str]:
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


def _drafters(domains: Domains) -> Iterator[list[str]]:
    """For the drafts that were live at the end; speeds are relative to their best chain."""
    for domain, figures in domains.items():
        for key in sorted((key for key in figures if key.startswith("drafters")), key=len):
            for name, found in figures[key].items():
                yield [
                    domain,
                    name,
                    key.partition("_")[2] or "1",
                    f"{found['tau']:.2f}",
                    f"{found['verified_per_token']:.2f}",
                    str(Estimate(*found["tokens_per_s_vs_chain"])),
                    str(Estimate(*found["tokens_per_s_vs_plain"])),
                ]


def write_html(
    config: Replay, found: Mapping[str, Any], chart: Path, path: Path, title: str
) -> Path:
    """One file that fetches nothing."""
    heading, image = html.escape(title), base64.b64encode(chart.read_bytes()).decode()
    parts = [f"<h1>{heading}</h1>", *_html_tables(found["domains"])]
    for name, domains in found["arms"].items():
        parts += [f"<h2>{html.escape(name)}</h2>", *_html_tables(domains)]
    style, source = "max-width:100%", f"data:image/png;base64,{image}"
    parts.append(f'<p><img alt="along the stream" style="{style}" src="{source}"></p>')
    for name, part in (("Figures", dict(found)), ("Configuration", config.model_dump())):
        text = html.escape(json.dumps(part, indent=1))
        parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{heading}</title>{STYLE}"
    path.write_text(head + "\n".join(parts) + "</html>\n")
    return path


def _html_tables(domains: Domains) -> Iterator[str]:
    for head, rows in tables(domains):
        lines = [_html_row("th", head), *(_html_row("td", row) for row in rows)]
        yield f"<table>{''.join(lines)}</table>"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
