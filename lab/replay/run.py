"""One arm of a replay with one seed, logged so that a stopped run goes on from there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoder.models.loading import ModelFiles, load_tokenizer
from lab.output import say
from lab.replay.config import Arm, Replay, spans
from lab.replay.log import Log, locked
from lab.replay.service import FROZEN, LIVE, Service
from lab.replay.serving import serve
from lab.replay.streams import StreamQuery, held_out_queries, stream
from lab.replay.wall import compare_speeds
from lab.streams import Stream
from online.settings import Settings
from online.signals import Signal

ANSWERED = 0.9  # share of held-out queries that must have a signal: an empty answer leaves none


@dataclass
class ArmRun:
    config: Replay
    arm: Arm
    seed: int
    out: Path

    def __post_init__(self) -> None:
        self.folder = self.out / f"{self.arm.name}-{self.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.folder / "log.jsonl")
        own: dict[str, Any] = {"target": self.config.target, "draft": self.config.draft}
        own |= {"lease_s": 3600.0, "canary_share": 0}
        self.settings = Settings(**{**own, **self.config.settings, **self.arm.settings})
        self.tokenizer = load_tokenizer(ModelFiles.of(self.settings))

    @cached_property
    def held_out(self) -> dict[str, list[StreamQuery]]:
        """By domain.

        Raises:
            ValueError: a domain's prompts can't be read, or are too few.
        """
        config = self.config
        size = (self.tokenizer, config.longest_prompt, config.held_out, self.seed)
        domains = config.domains.items()
        return {name: held_out_queries(name, domain.held_out, *size) for name, domain in domains}

    def serve_all(self) -> Log:
        """Serves all queries that the log does not hold yet, and learns from them."""
        if self.log.of("end"):
            return self.log
        with locked(self.folder), serve(self.config, self.settings, self.folder) as service:
            for domain in self.held_out:
                if not self.log.of("held_out", domain=domain, at=0):
                    self._measure(service, domain, 0, FROZEN, store=True)
            if not self.log.of("first"):
                domains = self._curves(service)
                self.log.add("first", 0, versions=service.versions(), domains=domains)
            self._log_cycles(service, self.log.served)  # those that a stopped run did not log
            queries = stream(self.config, self.tokenizer, self.seed)
            list(islice(queries, self.log.served))
            for span in spans(self.config):
                left = islice(queries, max(0, span.end - self.log.served))
                while chunk := list(islice(left, self.config.look_every)):
                    self._serve(service, chunk)
                for domain in span.domains:
                    if not self.log.of("held_out", domain=domain, at=span.end):
                        self._measure(service, domain, span.end, LIVE, store=False)
        self.log.add("end", self.config.queries)
        return self.log

    def time_speeds(self) -> Log:
        """Compares tokens per second for every set of held-out queries, with its live drafts.

        It runs after all else and alone: the machine's other work would be measured with it.
        """
        logged = {(event["domain"], event["at"]) for event in self.log.of("wall")}
        measured = [event for event in self.log.of("held_out") if event["at"]]
        left = [event for event in measured if (event["domain"], event["at"]) not in logged]
        if not left or not self.config.wall_queries:
            return self.log
        with locked(self.folder), serve(self.config, self.settings, self.folder) as service:
            for event in left:
                at, domain = event["at"], event["domain"]
                service.put(event["versions"])
                found = compare_speeds(service, self.held_out[domain], self.config)
                self.log.add("wall", at, domain=domain, threads=torch.get_num_threads(), **found)
                ratio, low, high = found["1"]["live_over"]["frozen"]
                self._say(at, f"{domain}: tokens/s × {ratio:.3f} ({low:.3f} to {high:.3f})")
        return self.log

    def _serve(self, service: Service, chunk: Sequence[StreamQuery]) -> None:
        """Answers some queries, evaluates both drafts on the answers, looks for work."""
        version = service.active
        answers = service.answer(chunk, gamma=self.config.gamma, store=True)
        signals = {s.request_id: s for s in service.newest(LIVE, len(chunk))}
        compared = [signals[query.name] for query in chunk if query.name in signals]
        figures: dict[str, list[float]] = {}
        frozen = service.evaluate(service.first_draft, compared)
        for name, found in (("frozen", frozen), ("live", service.evaluate_live(compared))):
            figures[f"{name}_tau"] = found.tokens_R.tolist()
            figures[f"{name}_acceptance"] = found.acceptance_R.tolist()
        rows = [_row(answer) for answer in answers]
        at = self.log.served + len(rows)
        domains = [query.domain for query in chunk]
        self.log.add("served", at, version=version.id, rows=rows, domains=domains, **figures)
        self._say(at, f"{chunk[-1].domain:10} version {version.id:3d}  τ {_tau(answers):.2f}")
        service.look()
        self._log_cycles(service, at)

    def _log_cycles(self, service: Service, at: int) -> None:
        """Logs cycles that have ended since, and what they swapped in."""
        known = {event["id"] for event in self.log.of("cycle")}
        for cycle in reversed(service.finished()):
            if cycle.id in known:
                continue
            reason = cycle.report.get("gate", cycle.report).get("reason", "")
            fields = {"id": cycle.id, "route": cycle.route, "state": cycle.state}
            train_s = cycle.report.get("train_s", 0.0)
            self.log.add("cycle", at, train_s=train_s, reason=reason, **fields)
            self._say(at, f"cycle {cycle.id} of {cycle.route} {cycle.state}: {reason}")
        versions = service.versions()
        if versions != [*self.log.of("first"), *self.log.of("swap")][-1]["versions"]:
            domains, newest = self._curves(service), max(versions.values())
            self.log.add("swap", at, version=newest, versions=versions, domains=domains)

    def _measure(self, service: Service, domain: str, at: int, route: str, store: bool) -> None:
        """Decodes a domain's held-out queries."""
        queries, gamma = self.held_out[domain], self.config.gamma
        answers = service.answer(queries, route=route, gamma=gamma, store=store)
        rows, versions = [_row(answer) for answer in answers], service.versions()
        self.log.add("held_out", at, domain=domain, rows=rows, versions=versions)
        self._say(at, f"{domain}: {len(answers)} held-out queries, τ {_tau(answers):.2f}")

    def _curves(self, service: Service) -> dict[str, dict[str, float]]:
        """The active drafts' expected τ and acceptance on every domain's held-out queries."""
        curves = {}
        for domain, signals in self._held_out_signals(service).items():
            found = service.evaluate_live(signals)
            acceptance = float(np.mean(found.acceptance_R))
            curves[domain] = {"tau": float(np.mean(found.tokens_R)), "acceptance": acceptance}
        return curves

    def _held_out_signals(self, service: Service) -> dict[str, list[Signal]]:
        """The first draft's answers to held-out queries, which evaluate later drafts."""
        signals = {signal.request_id: signal for signal in service.newest(FROZEN)}
        found = {
            domain: [signals[query.name] for query in queries if query.name in signals]
            for domain, queries in self.held_out.items()
        }
        for domain, queries in self.held_out.items():
            if len(found[domain]) < ANSWERED * len(queries):
                left = f"only {len(found[domain])} of {domain}'s held-out answers are left"
                raise ValueError(f"{self.folder}: {left}")
        return found

    def _say(self, at: int, what: str) -> None:
        say(f"{self.arm.name} {self.seed}: {at:6d}/{self.config.queries}  {what}")


def _row(answer: Stream) -> tuple[int, int, float, int]:
    """Tokens, target forwards, Σ over compared positions of Σ min(p, q), compared positions."""
    return len(answer.ids), answer.stats.steps, answer.stats.overlap, answer.stats.compared


def _tau(answers: Sequence[Stream]) -> float:
    return sum(len(a.ids) for a in answers) / sum(a.stats.steps for a in answers)
