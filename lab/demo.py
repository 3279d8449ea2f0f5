"""`make demo`: the whole loop on this machine, in one command.

Starts the service as `slipstream up` does (real Redis, decoder with REST API, Celery worker), measures the first draft
on held-out queries, replays traffic of a package that the draft has never seen while it learns from it, measures
again on the same held-out queries, and shows what was gained.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab import traffic
from lab.charts import LearningCurve, draw
from lab.statistics import Ratio, paired_ratio
from lab.traffic import Client, Served, Shape, answers
from online.errors import SlipstreamError
from online.settings import Settings
from online.stack import Stack

# The loop turns often enough to be watched. A SLIPSTREAM_* variable overrides any of these.
DEMO_SETTINGS: Mapping[str, Any] = {"port": 0, "cycle_min_signals": 100, "tick_s": 1.0, "poll_s": 0.2, "routes": "demo"}
CYCLE_WAIT_S = 90.0
HELD_OUT_TOKENS = 64  # more queries say more than longer answers
RECENT = 40  # requests that a progress line averages over


@dataclass(frozen=True)
class Examined:
    """The held-out queries' answers under one draft: as sampled as the traffic is, and greedy."""

    sampled: dict[int, Served]
    greedy: dict[int, Served]
    seconds: float

    @property
    def tau(self) -> float:
        return tokens_per_step(list(self.sampled.values()))

    @property
    def acceptance(self) -> float:
        return float(np.mean([a.overlap for a in self.sampled.values() if a.overlap is not None]))

    @property
    def tokens_per_s(self) -> float:
        return sum(a.tokens for a in [*self.sampled.values(), *self.greedy.values()]) / self.seconds


class Demo:
    def __init__(self, args: argparse.Namespace, client: Client, route: str) -> None:
        self._args, self._client, self._route = args, client, route
        self._started = time.monotonic()
        prompts = traffic.package_prompts
        self._held_out = prompts(args.package, args.held_out, held_out=True, seed=1)
        self._traffic = prompts(args.package, args.requests, held_out=False, seed=2)
        self.requests = 0

    def examine(self, what: str) -> Examined:
        self.say(f"{what}: {2 * len(self._held_out)} held-out queries, sampled and greedy")
        tokens, clients = min(self._args.max_tokens, HELD_OUT_TOKENS), self._args.clients
        shape = Shape(tokens, self._args.temperature, store=False, clients=clients)
        greedy = Shape(tokens, 0.0, store=False, clients=clients)
        started = time.monotonic()
        found = [answers(self._client, self._held_out, s, 1000, self._count) for s in (shape, greedy)]
        examined = Examined(*found, time.monotonic() - started)
        self.say(f"{what}: τ {examined.tau:.2f}, acceptance {examined.acceptance:.3f}")
        return examined

    def learn(self) -> list[Served]:
        """Replays the traffic while the loop learns from it; the answers in the order they came."""
        self.say(f"traffic: {len(self._traffic)} queries of {self._args.package}, {self._args.clients} clients")
        shape = Shape(self._args.max_tokens, self._args.temperature, clients=self._args.clients)
        served: list[Served] = []
        version, said = 0, time.monotonic()
        for _, answer in self._client.replay(self._traffic, shape, 5000):
            self._count()
            served.append(answer)
            if answer.versions and answer.versions[-1] > version:
                if version:
                    self.say(f"  swap: version {answer.versions[-1]} drafts from request {len(served)} on")
                version = answer.versions[-1]
            if time.monotonic() - said > 5:
                said = time.monotonic()
                self.say(f"  {self._progress(served)}")
        return served

    def settle(self) -> None:
        """Waits for a cycle that is under way, so that what is measured next is measured in quiet."""
        deadline, told = time.monotonic() + CYCLE_WAIT_S, False
        while time.monotonic() < deadline:
            route = self._client.admin(f"routes/{self._route}")
            if not route["unfinished_cycle"] and route["loaded_version"] == route["active_version"]:
                return
            if not told:
                self.say("waiting for the last cycle to end")
                told = True
            time.sleep(0.3)
        self.say(f"the last cycle is still running after {CYCLE_WAIT_S:.0f} s; going on")

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started:5.0f} s] {line}", flush=True)

    def _progress(self, served: Sequence[Served]) -> str:
        recent = served[-RECENT:]
        lately = f"τ {tokens_per_step(recent):.2f}, acceptance {mean_overlap(recent):.3f}"
        return f"{len(served):4d}/{len(self._traffic)} requests; last {len(recent)}: {lately}; {self._cycle()}"

    def _cycle(self) -> str:
        cycles = self._client.admin(f"cycles?route={self._route}&limit=1")["cycles"]
        return f"cycle {cycles[0]['id']} {cycles[0]['state']}" if cycles else "no cycle yet"

    def _count(self) -> None:
        self.requests += 1


def tokens_per_step(served: Sequence[Served]) -> float:
    return sum(a.tokens for a in served) / sum(a.steps for a in served)


def mean_overlap(served: Sequence[Served]) -> float:
    return float(np.mean([a.overlap for a in served if a.overlap is not None]))


def tau_ratio(before: dict[int, Served], after: dict[int, Served]) -> Ratio:
    """τ after ÷ before over the queries that both answered."""
    pairs = sorted(before.keys() & after.keys())
    sides = [
        tuple(np.array([getattr(side[i], name) for i in pairs], float) for name in ("tokens", "steps"))
        for side in (before, after)
    ]
    return paired_ratio(sides[0], sides[1])  # type: ignore[arg-type]


def run(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    started = time.monotonic()
    with Stack(settings) as stack:
        settings = stack.settings
        print(f"serving on {stack.url}; logs in {stack.logs}", flush=True)
        client, route = Client(stack.url, args.key, args.admin_key), settings.default_route
        demo = Demo(args, client, route)
        before = demo.examine("first draft")
        served = demo.learn()
        demo.settle()
        after = demo.examine("learnt draft")
        activations = list(reversed(client.admin(f"activations?route={route}")["activations"]))
        versions = {v["id"]: v for v in client.admin(f"routes/{route}/versions")["versions"]}
        cycles = client.admin(f"cycles?route={route}")["cycles"]
    chart = draw(LearningCurve(served, before.tau, after.tau, before.acceptance, after.acceptance), args.chart)
    ratio, greedy_ratio = tau_ratio(before.sampled, after.sampled), tau_ratio(before.greedy, after.greedy)
    same = sum(before.greedy[i].text == after.greedy[i].text for i in before.greedy.keys() & after.greedy.keys())
    figures: dict[str, Any] = {
        "tau_before": before.tau,
        "tau_after": after.tau,
        "tau_ratio": ratio.value,
        "tau_ratio_low": ratio.low,
        "tau_ratio_high": ratio.high,
        "acceptance_before": before.acceptance,
        "acceptance_after": after.acceptance,
        "greedy_tau_ratio": greedy_ratio.value,
        "greedy_tau_ratio_low": greedy_ratio.low,
        "greedy_same": same,
        "greedy_compared": len(before.greedy.keys() & after.greedy.keys()),
        "tokens_per_s_before": before.tokens_per_s,
        "tokens_per_s_after": after.tokens_per_s,
        "swaps": len(activations) - 1,
        "train_s": sum(cycle["report"].get("train_s", 0) for cycle in cycles),
        "requests": demo.requests + len(client.failures),
        "failed_requests": len(client.failures),
        "seconds": time.monotonic() - started,
        "package": args.package,
        "chart": str(chart),
    }
    _report(figures, before, after, activations, versions, ratio)
    for failure in client.failures[:5]:
        print(f"failed: {failure}")
    return figures


def _report(
    figures: Mapping[str, Any],
    before: Examined,
    after: Examined,
    activations: Sequence[Mapping[str, Any]],
    versions: Mapping[int, Mapping[str, Any]],
    ratio: Ratio,
) -> None:
    print("\nversions that served")
    for activation in activations:
        window = versions[activation["to_version"]]["window"]
        learnt = f"{window['trained_on']} signals" if window else "-"
        line = f"  {activation['to_version']:3d}  {activation['kind']:13} learnt from {learnt:12}"
        print(f"{line} {activation['reason']}")
    rows: list[tuple[str, str, str, str]] = [
        ("", "first draft", "learnt draft", "ratio (95 %)"),
        (
            "tokens per target forward, τ",
            f"{before.tau:.2f}",
            f"{after.tau:.2f}",
            f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        ),
        ("acceptance rate, Σ min(p, q)", f"{before.acceptance:.3f}", f"{after.acceptance:.3f}", ""),
        ("tokens/s (one run each)", f"{before.tokens_per_s:.0f}", f"{after.tokens_per_s:.0f}", ""),
    ]
    print(f"\nheld-out queries of {figures['package']}: {len(before.sampled)} sampled, {len(before.greedy)} greedy")
    for name, *cells in rows:
        print(f"  {name:30}" + "".join(f"{cell:>14}" for cell in cells[:2]) + f"   {cells[2]}")
    print(
        f"  greedy answers the same before and after: {figures['greedy_same']} of {figures['greedy_compared']}\n"
        f"\n{figures['requests']} requests, {figures['failed_requests']} failed, {figures['swaps']} swaps, "
        f"{figures['train_s']:.0f} s of training, {figures['seconds']:.0f} s in all\nchart: {figures['chart']}"
    )


def demo_settings() -> Settings:
    """The demo's defaults under what the environment says; embedded parts start empty, in a folder of their own."""
    given = Settings().model_fields_set
    settings = Settings(**{name: value for name, value in DEMO_SETTINGS.items() if name not in given})
    folder = settings.data_dir.absolute() / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return settings.model_copy(update={"data_dir": folder})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=500, help="queries of traffic")
    parser.add_argument("--held-out", type=int, default=60, help="queries measured before and after")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer of the traffic")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the traffic and the sampled measurement")
    parser.add_argument("--clients", type=int, default=8, help="requests under way at a time")
    parser.add_argument(
        "--package", default="", help="installed package to take code from; default: the largest unseen"
    )
    parser.add_argument("--chart", type=Path, default=None, help="where the chart goes; default: in the demo's folder")
    parser.add_argument("--key", default="", help="generation key, where keys are configured")
    parser.add_argument("--admin-key", default="", help="admin key, where keys are configured")
    args = parser.parse_args()
    args.package = args.package or traffic.shifted_package()
    try:
        settings = demo_settings()
        args.chart = (args.chart or settings.data_dir / "chart.png").absolute()
        figures = run(args, settings)
    except (SlipstreamError, ValueError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: stopped")
    print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in figures.items()}))


if __name__ == "__main__":
    main()
