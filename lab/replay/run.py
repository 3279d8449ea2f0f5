"""One arm of a replay with one seed: everything that happens goes into a log, and from the log it goes on."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from decoder.models.loading import ModelFiles, load_tokenizer
from lab.replay.config import Arm, Replay, stretches
from lab.replay.service import FROZEN, LIVE, Service, serve
from lab.replay.streams import Asked, Stream, exam
from lab.replay.wall import compare_speeds
from lab.rig import Answer
from lab.statistics import rounded
from online.settings import Settings
from online.signals import Signal

KNOWN = 200  # of the stream's last queries, answered before tokens per second are compared
Event = dict[str, Any]


class Log:
    """JSON lines. One that a kill has cut short is dropped, and what it told happens again.

    The report is made of it alone, and it is small enough to be kept beside the report.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        os.truncate(path, len(whole))
        self.events: list[Event] = [json.loads(line) for line in whole.splitlines()]

    def add(self, kind: str, at: int, **told: Any) -> Event:
        event: Event = rounded({"kind": kind, "at": at, **told})
        self.events.append(event)
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        return event

    def of(self, kind: str, **like: Any) -> list[Event]:
        return [
            e
            for e in self.events
            if e["kind"] == kind and all(e.get(key) == value for key, value in like.items())
        ]

    @property
    def served(self) -> int:
        return sum(len(event["rows"]) for event in self.of("served"))


class ArmRun:
    def __init__(
        self, config: Replay, arm: Arm, seed: int, folder: Path, say: Callable[[str], None]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._config, self._seed, self._folder, self._say = config, seed, folder, say
        given = {
            "target": config.target,
            "draft": config.draft,
            "lease_s": 3600.0,
            "canary_share": 0,
            **config.settings,
            **arm.settings,
        }
        self._settings = Settings(**given)
        self.log = Log(folder / "log.jsonl")
        tokenizer = load_tokenizer(ModelFiles.of(self._settings))
        self._stream = Stream(
            config.domains,
            config.segments,
            tokenizer,
            config.longest_prompt,
            config.greedy_share,
            seed,
        )
        self._exams = {
            name: exam(
                name, domain.held_out, tokenizer, config.longest_prompt, config.held_out, seed
            )
            for name, domain in config.domains.items()
        }

    def go(self) -> Log:
        """Runs what the log does not tell of yet, but for the comparison of tokens per second."""
        if self.log.of("end"):
            return self.log
        with alone(self._folder), serve(self._config, self._settings, self._folder) as service:
            for domain in self._exams:
                if not self.log.of("exam", domain=domain, at=0):
                    self._examine(service, domain, 0, FROZEN, store=True)
            if not self.log.of("first"):
                self.log.add("first", 0, versions=service.versions(), domains=self._curves(service))
            self._learnt(service, self.log.served)  # what a stopped run did not come to tell
            asked, at = iter(self._stream), 0
            for segment in self._config.segments:
                end = at + segment.queries
                skipped = min(max(self.log.served - at, 0), segment.queries)
                list(islice(asked, skipped))
                for chunk in _chunks(
                    islice(asked, segment.queries - skipped), self._config.look_every
                ):
                    self._serve(service, chunk)
                for domain in next(
                    part.domains for part in stretches(self._config) if part.end == end
                ):
                    self._close(service, domain, end)
                at = end
        self.log.add("end", at)
        return self.log

    def time(self) -> Log:
        """Compares tokens per second, for every exam of the stream with the drafts that were live then.

        Apart from the rest and after it: whatever else the machine does meanwhile would be measured with it.
        """
        exams = [event for event in self.log.of("exam") if event["at"]]
        left = [
            exam for exam in exams if not self.log.of("wall", domain=exam["domain"], at=exam["at"])
        ]
        if not left or not self._config.wall_queries:
            return self.log
        with alone(self._folder), serve(self._config, self._settings, self._folder) as service:
            for exam in left:
                at, domain = exam["at"], exam["domain"]
                service.put(exam["versions"])
                # As a service has before: n-grams know what the last queries were answered.
                known = list(islice(self._stream, max(0, at - KNOWN), at))
                service.answer(known, gamma=self._config.gamma, store=True)
                found = compare_speeds(service, self._exams[domain], self._config)
                self.log.add("wall", at, domain=domain, threads=torch.get_num_threads(), **found)
                ratio, low, high = found["1"]["ratios"]["live_frozen"]
                self._tell(at, f"{domain}: tokens/s × {ratio:.3f} ({low:.3f} to {high:.3f})")
        return self.log

    # ── what happens ──

    def _serve(self, service: Service, chunk: Sequence[Asked]) -> None:
        started, version = time.monotonic(), service.active
        answers = service.answer(chunk, gamma=self._config.gamma, store=True)
        seconds = time.monotonic() - started
        signals = {s.request_id: s for s in service.newest(LIVE, len(chunk))}
        both = [signals[one.name] for one in chunk if one.name in signals]
        frozen = service.judge(service.first_draft, both)
        live = service.judge_live(both)
        rows = [_row(answer) for answer in answers]
        at = self.log.served + len(rows)
        told = {
            f"{name}_{what}": values.tolist()
            for name, judged in (("frozen", frozen), ("live", live))
            for what, values in zip(("tau", "acceptance"), judged, strict=True)
        }
        domains = [one.domain for one in chunk]
        self.log.add(
            "served", at, version=version.id, seconds=seconds, rows=rows, domains=domains, **told
        )
        tau = sum(row[0] for row in rows) / sum(row[1] for row in rows)
        self._tell(at, f"{chunk[-1].domain:10} version {version.id:3d}  τ {tau:.2f}")
        self._learn(service, at)

    def _learn(self, service: Service, at: int) -> None:
        service.look()
        self._learnt(service, at)

    def _learnt(self, service: Service, at: int) -> None:
        """Tells of the cycles that have ended since this was last told, and of what they swapped in."""
        known = {event["id"] for event in self.log.of("cycle")}
        for cycle in reversed(service.finished()):
            if cycle.id in known:
                continue
            told = cycle.report.get("gate", cycle.report).get("reason", "")
            train_s = cycle.report.get("train_s", 0.0)
            self.log.add(
                "cycle",
                at,
                id=cycle.id,
                route=cycle.route,
                state=cycle.state,
                train_s=train_s,
                reason=told,
            )
            self._tell(at, f"cycle {cycle.id} of {cycle.route} {cycle.state}: {told}")
        versions = service.versions()
        if versions != [*self.log.of("first"), *self.log.of("swap")][-1]["versions"]:
            newest = max(versions.values())
            self.log.add(
                "swap", at, version=newest, versions=versions, domains=self._curves(service)
            )

    def _close(self, service: Service, domain: str, at: int) -> None:
        """A domain's segment has ended: its held-out queries are decoded."""
        if not self.log.of("exam", domain=domain, at=at):
            self._examine(service, domain, at, LIVE, store=False)

    def _examine(self, service: Service, domain: str, at: int, route: str, store: bool) -> None:
        answers = service.answer(
            self._exams[domain], route=route, gamma=self._config.gamma, store=store
        )
        rows = [_row(answer) for answer in answers]
        self.log.add("exam", at, domain=domain, rows=rows, versions=service.versions())
        tokens, steps = sum(len(a.ids) for a in answers), sum(a.stats.steps for a in answers)
        self._tell(at, f"{domain}: {len(answers)} held-out queries, τ {tokens / steps:.2f}")

    def _held_out(self, service: Service) -> dict[str, list[Signal]]:
        """The exams' answers under the first draft: what later drafts are judged by without decoding."""
        signals = {
            signal.request_id: signal for signal in service.newest(FROZEN)
        }  # a stopped exam was asked again
        found = {
            domain: [signals[one.name] for one in asked if one.name in signals]
            for domain, asked in self._exams.items()
        }
        for domain, held_out in found.items():
            if len(held_out) < 0.9 * len(self._exams[domain]):  # an empty answer leaves no signal
                raise ValueError(
                    f"{self._folder}: only {len(held_out)} of {domain}'s held-out answers are left"
                )
        return found

    def _tell(self, at: int, what: str) -> None:
        self._say(f"{at:6d}/{self._config.queries}  {what}")

    def _curves(self, service: Service) -> dict[str, dict[str, float]]:
        """The active drafts' expected τ and acceptance on every domain's held-out queries."""
        found = {}
        for domain, signals in self._held_out(service).items():
            tokens, acceptance = service.judge_live(signals)
            found[domain] = {"tau": float(tokens.mean()), "acceptance": float(acceptance.mean())}
        return found


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two processes would write one log, one database and one Redis.

    Raises:
        ValueError: another one is at work in this folder.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{folder}: another replay is at work here") from error
        yield


def _row(answer: Answer) -> tuple[int, int, float, int]:
    """Tokens, target forwards, Σ over compared positions of Σ min(p, q), compared positions."""
    return len(answer.ids), answer.stats.steps, answer.stats.overlap, answer.stats.compared


def _chunks(asked: Iterator[Asked], size: int) -> Iterator[list[Asked]]:
    while chunk := list(islice(asked, size)):
        yield chunk
