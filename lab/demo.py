"""`make demo`: the whole loop on this machine, in one command.

Starts the service as `slipstream up` does (Redis, decoder with its REST API, Celery worker) and
measures the first draft on held-out queries. Then it sends traffic of a package that the draft has
never seen, while the draft learns from it, and measures again on the same held-out queries.
"""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab.charts import LearningCurve, draw
from lab.corpus import held_out_packages, package_prompts
from lab.options import option, parse
from lab.outcome import HeldOut, gained, mean_overlap, show_gain, show_versions, tokens_per_step
from lab.output import finish, say
from lab.traffic import Client, RequestOptions, Served
from online.settings import Settings
from online.stack import Stack

# The loop cycles fast enough to watch. A SLIPSTREAM_* variable overrides any of these.
# A canary gets half of a thin traffic and decides early: an equal draft is refused once in six.
# Where plain steps are faster, requests compare nothing, so fewer have to.
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
    "search_recipe": False,  # it costs three passes
}
LOOK_S = 1.0  # between two looks at the route
SAY_S = 5.0  # between two lines of progress
CYCLE_WAIT_S = 120.0
QUIET_S = 3.0  # after a canary ends, the next tick may start a cycle
HELD_OUT_TOKENS = 64  # more queries say more than longer answers
# γ of held-out queries is fixed. Chosen by the service it would grow with the draft, and τ with it.
HELD_OUT_GAMMA = 4
RECENT = 40  # requests that a line of progress averages over


@dataclass(frozen=True, kw_only=True)
class Options:
    requests: int = option(500, "queries of traffic")
    held_out: int = option(60, "queries measured before and after")
    max_tokens: int = option(96, "of an answer of the traffic")
    temperature: float = option(1.0, "of the sampled half of the queries; the others are greedy")
    clients: int = option(8, "requests in flight")
    rate: float = option(4.0, "queries of traffic a second, at most")
    package: str = option("", "installed package to take code from (default: the largest unseen)")
    chart: Path | None = option(None, "file for the chart (default: in the demo's folder)")
    key: str = option("", "generation key, where keys are configured")
    admin_key: str = option("", "admin key, where keys are configured")

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError("--rate: must be more than 0")


class Demo:
    def __init__(self, options: Options, client: Client, route: str, package: str) -> None:
        self._options, self._client, self._route = options, client, route
        self._held_out = package_prompts(package, options.held_out, held_out=True, seed=1)
        self._traffic = package_prompts(package, options.requests, held_out=False, seed=2)
        self._active = self._canary = 0  # versions, as last seen

    def measure(self, what: str) -> HeldOut:
        say(f"{what}: {2 * len(self._held_out)} held-out queries, sampled and greedy")
        tokens = min(self._options.max_tokens, HELD_OUT_TOKENS)
        sampled = RequestOptions(tokens, self._options.temperature, False, HELD_OUT_GAMMA)
        greedy = replace(sampled, temperature=0.0)
        sides = [dict(self._client.send(self._held_out, [s], 1000)) for s in (sampled, greedy)]
        found = HeldOut(*sides)
        served = list(found.all.values())
        say(f"{what}: τ {tokens_per_step(served):.2f}, acceptance {mean_overlap(served):.3f}")
        return found

    def learn(self) -> list[Served]:
        """Sends the traffic while the loop learns from it; answers in the order they came."""
        options = self._options
        say(f"traffic: {len(self._traffic)} queries, at most {options.rate:g} a second")
        sampled = RequestOptions(options.max_tokens, options.temperature)
        kinds = [sampled, replace(sampled, temperature=0.0)]
        served: list[Served] = []
        looked = said = time.monotonic()
        for _, answer in self._client.send(self._traffic, kinds, 5000, options.rate):
            served.append(answer)
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                self._look(len(served))
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                say(f"  {self._progress(served)}")
        return served

    def _look(self, request: int) -> None:
        """Reports what has changed on the route."""
        route = self._client.admin(f"routes/{self._route}")
        active, canary = route["active_version"], route["canary"]
        if self._active not in (0, active):
            say(f"  swap: version {active} drafts for everyone from request {request} on")
        elif self._canary and not canary:
            say(f"  canary: version {self._canary} was rolled back at request {request}")
        if canary and canary["version"] != self._canary:
            share = f"{canary['share']:.0%} of requests"
            say(f"  canary: version {canary['version']} drafts for {share} from {request} on")
        self._active, self._canary = active, canary["version"] if canary else 0

    def wait(self) -> None:
        """Waits until no cycle and no canary is left, so that one draft is measured, undisturbed.

        A canary gets no more requests, so it is promoted: it has passed the gate.
        """
        deadline = time.monotonic() + CYCLE_WAIT_S
        quiet_since = math.inf
        say("waiting for the last cycle to end")
        while (now := time.monotonic()) < deadline:
            quiet_since = math.inf if self._busy() else min(quiet_since, now)
            if now - quiet_since > QUIET_S:
                return
            time.sleep(0.3)
        say(f"the last cycle is still running after {CYCLE_WAIT_S:.0f} s; continuing")

    def _busy(self) -> bool:
        route = self._client.admin(f"routes/{self._route}")
        if canary := route["canary"]:
            reason = "the traffic has ended before the test"
            if self._client.change(f"routes/{self._route}/canary/promote", reason):
                say(f"version {canary['version']} promoted: {reason}")
        swapping = route["loaded_version"] != route["active_version"]
        return bool(canary or route["unfinished_cycle"] or swapping)

    def _progress(self, served: Sequence[Served]) -> str:
        recent = served[-RECENT:]
        # Where plain steps are faster nothing is drafted and nothing compared.
        compared = any(answer.overlap is not None for answer in recent)
        acceptance = f"{mean_overlap(recent):.3f}" if compared else "not measured"
        cycles = self._client.admin(f"cycles?route={self._route}&limit=1")["cycles"]
        cycle = f"cycle {cycles[0]['id']} {cycles[0]['state']}" if cycles else "no cycle yet"
        done = f"{len(served):4d}/{len(self._traffic)} requests"
        lately = f"last {len(recent)}: τ {tokens_per_step(recent):.2f}, acceptance {acceptance}"
        return f"{done}; {lately}; {cycle}"


def run(options: Options, settings: Settings) -> dict[str, Any]:
    package = options.package or held_out_packages()[0]
    with Stack(settings) as stack:
        print(f"serving on {stack.url}; logs in {stack.logs}", flush=True)
        client = Client(stack.url, options.key, options.admin_key, options.clients)
        route = stack.settings.default_route
        demo = Demo(options, client, route, package)
        before = demo.measure("first draft")
        served = demo.learn()
        demo.wait()
        after = demo.measure("learnt draft")
        activations = client.admin(f"activations?route={route}")["activations"][::-1]
        versions = {v["id"]: v for v in client.admin(f"routes/{route}/versions")["versions"]}
        cycles = client.admin(f"cycles?route={route}")["cycles"]
    figures: dict[str, Any] = {
        **gained(before, after),
        "swaps": len(activations) - 1,
        "train_s": sum(cycle["report"].get("train_s", 0) for cycle in cycles),
        "requests": client.requests,
        "failed_requests": len(client.failures),
        "package": package,
    }
    ends = ("tau_before", "tau_after", "acceptance_before", "acceptance_after")
    chart = options.chart or settings.data_dir / "chart.png"
    curve = LearningCurve(served, *(figures[key] for key in ends))
    figures["chart"] = str(draw(curve, chart.absolute()))
    show_versions(activations, versions)
    show_gain(figures)
    for failure in client.failures[:5]:
        print(f"failed: {failure}")
    return figures


def demo_settings() -> Settings:
    """The demo's defaults, below the environment's; embedded servers start empty in a folder."""
    given = Settings().model_fields_set
    defaults = {name: value for name, value in DEMO_SETTINGS.items() if name not in given}
    settings = Settings(**defaults)
    folder = settings.data_dir.absolute() / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return settings.model_copy(update={"data_dir": folder})


def main() -> None:
    options = parse(Options, "demo", __doc__)
    finish(run(options, demo_settings()))
