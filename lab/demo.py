"""`make demo`: the whole loop on this machine, in one command.

Starts the service as `slipstream up` does (real Redis, decoder with REST API, Celery worker), measures the first draft
on held-out queries, replays traffic of a package that the draft has never seen while it learns from it, measures
again on the same held-out queries, and shows what was gained.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import traffic
from lab.charts import LearningCurve, draw
from lab.outcome import Examined, gained, mean_overlap, report, tokens_per_step
from lab.traffic import Client, Served, Shape, answers
from online.settings import Settings
from online.stack import Stack

# The loop turns often enough to be watched. A SLIPSTREAM_* variable overrides any of these.
# A canary has half of a thin traffic, and its means decide early: of equal drafts that sends one in six back. Where
# plain steps are faster a request compares nothing, so fewer have to.
DEMO_SETTINGS: Mapping[str, Any] = {
    "port": 0,
    "cycle_min_signals": 150,
    "tick_s": 1.0,
    "poll_s": 0.2,
    "routes": "demo",
    "canary_share": 0.5,
    "canary_requests": 25,
    "canary_margin": 0.05,
    "guard_requests": 10,
    "search_recipe": False,  # which costs three passes
}
LOOK_S, SAY_S = 1.0, 5.0  # how often the demo looks at its route, and says how the traffic goes
CYCLE_WAIT_S = 120.0
QUIET_S = 3.0  # a canary's end may let a cycle start, at the next tick
HELD_OUT_TOKENS = 64  # more queries say more than longer answers
EXAM_GAMMA = 4
RECENT = 40  # requests that a progress line averages over


class Demo:
    def __init__(self, args: argparse.Namespace, client: Client, route: str) -> None:
        self._args, self._client, self._route = args, client, route
        self._started = time.monotonic()
        prompts = traffic.package_prompts
        self._held_out = prompts(args.package, args.held_out, held_out=True, seed=1)
        self._traffic = prompts(args.package, args.requests, held_out=False, seed=2)
        self.requests = 0
        self._active = self._canary = 0  # versions, as last seen

    def examine(self, what: str) -> Examined:
        self.say(f"{what}: {2 * len(self._held_out)} held-out queries, sampled and greedy")
        tokens, clients = min(self._args.max_tokens, HELD_OUT_TOKENS), self._args.clients
        # γ is fixed: left to the service it would grow with the draft, and tokens a step would say less.
        shape = Shape(
            tokens, self._args.temperature, store=False, clients=clients, gamma=EXAM_GAMMA
        )
        greedy = replace(shape, temperature=0.0)
        found = [
            answers(self._client, self._held_out, s, 1000, self._count) for s in (shape, greedy)
        ]
        examined = Examined(found[0], found[1])
        served = list(examined.all.values())
        self.say(f"{what}: τ {tokens_per_step(served):.2f}, acceptance {mean_overlap(served):.3f}")
        return examined

    def learn(self) -> list[Served]:
        """Replays the traffic while the loop learns from it; the answers in the order they came."""
        self.say(
            f"traffic: {len(self._traffic)} queries of {self._args.package}, {self._args.rate:g} a second at most; "
            f"every other one greedy, the others at T = {self._args.temperature:g}"
        )
        shapes = [
            Shape(self._args.max_tokens, t, clients=self._args.clients)
            for t in (self._args.temperature, 0.0)
        ]
        served: list[Served] = []
        looked = said = time.monotonic()
        for _, answer in self._client.replay(self._traffic, shapes, 5000, self._args.rate):
            self._count()
            served.append(answer)
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                self._look(len(served))
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                self.say(f"  {self._progress(served)}")
        return served

    def _look(self, request: int) -> None:
        """Says what has changed on the route."""
        route = self._client.admin(f"routes/{self._route}")
        active, canary = route["active_version"], route["canary"]
        if self._active not in (0, active):
            self.say(f"  swap: version {active} drafts for everyone from request {request} on")
        elif self._canary and not canary:
            self.say(f"  canary: version {self._canary} was sent back at request {request}")
        if canary and canary["version"] != self._canary:
            self.say(
                f"  canary: version {canary['version']} drafts for {canary['share']:.0%} from request {request} on"
            )
        self._active, self._canary = active, canary["version"] if canary else 0

    def settle(self) -> None:
        """Waits until nothing is under way any more, so that what is measured next is one draft, and in quiet.

        A canary gets no more requests to be tested on: what has passed the gate is promoted.
        """
        deadline, quiet_since, told = time.monotonic() + CYCLE_WAIT_S, 0.0, False
        while (now := time.monotonic()) < deadline:
            route = self._client.admin(f"routes/{self._route}")
            if canary := route["canary"]:
                reason = "the traffic has ended before the test"
                if self._client.change(f"routes/{self._route}/canary/promote", reason):
                    self.say(f"version {canary['version']} promoted: {reason}")
            busy = (
                canary
                or route["unfinished_cycle"]
                or route["loaded_version"] != route["active_version"]
            )
            quiet_since = 0.0 if busy else quiet_since or now
            if quiet_since and now - quiet_since > QUIET_S:
                return
            if busy and not told:
                self.say("waiting for the last cycle to end")
                told = True
            time.sleep(0.3)
        self.say(f"the last cycle is still running after {CYCLE_WAIT_S:.0f} s; going on")

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started:5.0f} s] {line}", flush=True)

    def _progress(self, served: Sequence[Served]) -> str:
        recent = served[-RECENT:]
        compared = any(
            one.overlap is not None for one in recent
        )  # none is where plain steps are faster
        acceptance = f"{mean_overlap(recent):.3f}" if compared else "not measured"
        lately = f"τ {tokens_per_step(recent):.2f}, acceptance {acceptance}"
        return f"{len(served):4d}/{len(self._traffic)} requests; last {len(recent)}: {lately}; {self._cycle()}"

    def _cycle(self) -> str:
        cycles = self._client.admin(f"cycles?route={self._route}&limit=1")["cycles"]
        return f"cycle {cycles[0]['id']} {cycles[0]['state']}" if cycles else "no cycle yet"

    def _count(self) -> None:
        self.requests += 1


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
    figures: dict[str, Any] = {
        **gained(before, after),
        "swaps": len(activations) - 1,
        "train_s": sum(cycle["report"].get("train_s", 0) for cycle in cycles),
        "requests": demo.requests + len(client.failures),
        "failed_requests": len(client.failures),
        "seconds": time.monotonic() - started,
        "package": args.package,
    }
    ends = [
        figures[key] for key in ("tau_before", "tau_after", "acceptance_before", "acceptance_after")
    ]
    figures["chart"] = str(draw(LearningCurve(served, *ends), args.chart))
    report(figures, activations, versions)
    for failure in client.failures[:5]:
        print(f"failed: {failure}")
    return figures


def demo_settings() -> Settings:
    """The demo's defaults under what the environment says; embedded parts start empty, in a folder of their own."""
    given = Settings().model_fields_set
    settings = Settings(
        **{name: value for name, value in DEMO_SETTINGS.items() if name not in given}
    )
    folder = settings.data_dir.absolute() / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return settings.model_copy(update={"data_dir": folder})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=500, help="queries of traffic")
    parser.add_argument(
        "--held-out", type=int, default=60, help="queries measured before and after"
    )
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer of the traffic")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of the sampled half of the queries; the other half is greedy",
    )
    parser.add_argument("--clients", type=int, default=8, help="requests under way at a time")
    parser.add_argument(
        "--rate", type=float, default=4.0, help="queries of traffic a second, at most"
    )
    parser.add_argument(
        "--package",
        default="",
        help="installed package to take code from; default: the largest unseen",
    )
    parser.add_argument(
        "--chart",
        type=Path,
        default=None,
        help="where the chart goes; default: in the demo's folder",
    )
    parser.add_argument("--key", default="", help="generation key, where keys are configured")
    parser.add_argument("--admin-key", default="", help="admin key, where keys are configured")
    args = parser.parse_args()
    if args.rate <= 0:
        parser.error("--rate: must be more than 0")
    args.package = args.package or traffic.shifted_package()
    settings = demo_settings()
    args.chart = (args.chart or settings.data_dir / "chart.png").absolute()
    figures = run(args, settings)
    print(
        json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in figures.items()})
    )


if __name__ == "__main__":
    main()
