"""`python -m lab bench serve`: the REST API under Poisson arrivals, decoding plainly and speculatively.

Starts the service as `slipstream up` does (or goes to one that runs, with --url) and sends streaming requests that do
not wait for each other. At every rate the arms take turns, plain first, then last; both get the same prompts at the
same moments. Client and service share the machine.

Time to first token counts from the moment a request is sent. A piece of k tokens that comes t seconds after the one
before it is k gaps of t / k. Goodput is the share of all requests that were answered within both limits.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from lab import rig
from online.errors import SlipstreamError
from online.settings import Settings
from online.stack import Stack

ARMS: Mapping[str, dict[str, Any]] = {"plain": {"speculation": {"gamma": 0}}, "speculative": {}}
PERCENTILES = (50, 95, 99)
WARM_UP = 4  # requests of each arm before anything is measured
ANSWER_LIMIT_S = 120.0
NEVER = (
    10**9
)  # signals: the benchmark's own service records, as always, but does not learn meanwhile


@dataclass(frozen=True)
class Call:
    """One request: when it is sent, and what with."""

    at_s: float
    path: str
    body: dict[str, Any]


@dataclass
class Reply:
    """What came back, and when."""

    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between tokens
    tokens: int = 0
    steps: int = 0
    finished: bool = False
    error: str = ""

    def within(self, first_s: float, gap_s: float) -> bool:
        return (
            not self.error
            and self.first_s <= first_s
            and (not self.gaps_s or float(np.mean(self.gaps_s)) <= gap_s)
        )


@dataclass
class Arm:
    """One arm's replies at one rate, and the time they took."""

    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self, args: argparse.Namespace) -> dict[str, float]:
        answered = [reply for reply in self.replies if not reply.error]
        tokens, steps = (
            sum(getattr(reply, name) for reply in answered) for name in ("tokens", "steps")
        )
        good = sum(reply.within(args.ttft_slo, args.itl_slo) for reply in answered)
        return {
            "requests": len(self.replies),
            "errors": len(self.replies) - len(answered),
            **_percentiles("ttft_ms", [reply.first_s for reply in answered]),
            **_percentiles("itl_ms", [gap for reply in answered for gap in reply.gaps_s]),
            "requests_per_s": round(len(answered) / self.seconds, 3),
            "tokens_per_s": round(tokens / self.seconds, 1),
            "goodput": round(good / max(1, len(self.replies)), 4),
            "tokens_per_step": round(tokens / max(1, steps), 3),
        }


class Traffic:
    """Requests for the service, the same for the same seed."""

    def __init__(self, args: argparse.Namespace, prompts: Sequence[str], store: bool) -> None:
        self._args, self._prompts, self._store = args, prompts, store
        self.chat = args.chat if args.chat is not None else args.prompts is not None

    def poisson(self, arm: str, rate: float, seconds: float, seed: int) -> list[Call]:
        """Requests whose distances in time are exponential: nobody waits for anybody."""
        rng = random.Random(f"{seed} {rate}")
        calls: list[Call] = []
        at_s = rng.expovariate(rate)
        while at_s < seconds or not calls:
            calls.append(self.call(arm, at_s, rng.randrange(len(self._prompts))))
            at_s += rng.expovariate(rate)
        return calls

    def call(self, arm: str, at_s: float, i: int) -> Call:
        prompt = self._prompts[i]
        body: dict[str, Any] = {
            **(
                {"messages": [{"role": "user", "content": prompt}]}
                if self.chat
                else {"prompt": prompt}
            ),
            **ARMS[arm],
            "max_tokens": self._args.max_tokens,
            "temperature": self._args.temperature,
            "seed": i,
            "store": self._store,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        return Call(at_s, "/v1/chat/completions" if self.chat else "/v1/completions", body)


async def replay(url: str, key: str, calls: Sequence[Call]) -> Arm:
    """Sends every call at its time, and waits for all answers."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=ANSWER_LIMIT_S, limits=limits
    ) as client:
        started = time.perf_counter()

        async def at_its_time(call: Call) -> Reply:
            await asyncio.sleep(max(0.0, started + call.at_s - time.perf_counter()))
            return await send(client, call)

        replies = await asyncio.gather(*map(at_its_time, calls))
        return Arm(list(replies), time.perf_counter() - started)


async def send(client: httpx.AsyncClient, call: Call) -> Reply:
    """One request; whatever goes wrong is the reply's error."""
    reply, last = Reply(), time.perf_counter()
    sent = last
    try:
        async with client.stream("POST", call.path, json=call.body) as answer:
            if answer.is_error:
                reply.error = f"{answer.status_code}: {(await answer.aread()).decode()}"
                return reply
            async for event in _events(answer):
                now = time.perf_counter()
                if count := _take(reply, event):
                    if reply.tokens == count:
                        reply.first_s = now - sent
                    else:
                        reply.gaps_s += [(now - last) / count] * count
                    last = now
    except httpx.HTTPError as error:
        reply.error = f"{type(error).__name__}: {error}"
    if not reply.finished and not reply.error:
        reply.error = "the stream ended before the answer did"
    return reply


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON bodies of server-sent events."""
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _take(reply: Reply, event: dict[str, Any]) -> int:
    """Adds an event to the reply; returns the number of tokens in it."""
    if "error" in event:
        reply.error = str(event["error"]["message"])
        return 0
    count = 0
    for choice in event["choices"]:
        count += len(choice.get("token_ids") or ())  # a chat's opening has none
        reply.finished = reply.finished or choice["finish_reason"] is not None
    reply.tokens += count
    if metrics := event.get("metrics"):
        reply.steps = metrics["speculative_decoding"]["num_spec_steps"]
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rig.add_arguments(parser)
    parser.add_argument(
        "--url",
        default="",
        help="of a running service; its own settings hold, and nothing is recorded",
    )
    parser.add_argument("--key", default="", help="generation key, where keys are configured")
    parser.add_argument(
        "--rate", default="1,2,4", help="requests a second, comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--duration", type=float, default=30.0, help="seconds of arrivals, by rate and arm"
    )
    parser.add_argument(
        "--turns", type=int, default=2, help="parts that an arm's duration is cut into"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="chat completions (default: with --prompts)",
    )
    parser.add_argument(
        "--ttft-slo", type=float, default=1.0, help="seconds to the first token that are good"
    )
    parser.add_argument(
        "--itl-slo",
        type=float,
        default=0.1,
        help="seconds between tokens, on average, that are good",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    try:
        traffic = Traffic(
            args, rig.read_prompts(args.prompts, args.prompt_count), store=not args.url
        )
        with ExitStack() as services:
            arms = _measure(
                args, traffic, args.url or services.enter_context(_service(args, services)).url
            )
    except (SlipstreamError, ValueError) as error:
        sys.exit(f"bench serve: {error}")
    figures = _figures(args, arms)
    print(
        json.dumps({**figures, "chat": traffic.chat, "seconds": round(time.monotonic() - started)})
    )


def _service(args: argparse.Namespace, services: ExitStack) -> Stack:
    """A service with the pair that was asked for, whose embedded servers and files are gone afterwards."""
    folder = Path(services.enter_context(tempfile.TemporaryDirectory()))
    fresh: dict[str, Any] = {
        "data_dir": folder,
        "artifacts_dir": folder / "artifacts",
        "redis_url": "",
        "database_url": "",
        "port": 0,
    }
    pair = {name: getattr(args, name) for name in ("target", "draft", "dtype", "device", "threads")}
    asked = {
        name: value for name, value in pair.items() if value not in ("", 0, "auto")
    }  # else what the environment says
    return Stack(Settings(**fresh, **asked, cycle_min_signals=NEVER, cycle_max_signals=NEVER))


def _measure(args: argparse.Namespace, traffic: Traffic, url: str) -> dict[tuple[float, str], Arm]:
    for arm in ARMS:
        asyncio.run(
            replay(
                url,
                args.key,
                [traffic.call(arm, 0.0, i % args.prompt_count) for i in range(WARM_UP)],
            )
        )
    found = {(rate, arm): Arm() for rate in _rates(args) for arm in ARMS}
    print(
        f"{'rate':>5} {'turn':>4} {'arm':12} {'requests':>8} {'errors':>6} {'TTFT':>9} {'ITL':>8} {'tokens/s':>8}"
    )
    for rate, turn, arm in _turns(_rates(args), args.turns):
        calls = traffic.poisson(arm, rate, args.duration / args.turns, args.seed + turn)
        part = asyncio.run(replay(url, args.key, calls))
        part.seconds = max(
            part.seconds, args.duration / args.turns
        )  # also the quiet after the last one counts
        found[rate, arm].seconds += part.seconds
        _line(f"{rate:5g} {turn + 1:4d} {arm:12}", part.figures(args))
        found[rate, arm].replies += part.replies
    return found


def _turns(rates: Sequence[float], turns: int) -> Iterator[tuple[float, int, str]]:
    """Rate, turn and arm; who goes first alternates."""
    for number, rate in enumerate(rates):
        for turn in range(turns):
            yield from (
                (rate, turn, arm)
                for arm in (list(ARMS) if (number + turn) % 2 == 0 else reversed(list(ARMS)))
            )


def _rates(args: argparse.Namespace) -> list[float]:
    return [float(rate) for rate in args.rate.split(",")]


def _line(head: str, figures: Mapping[str, float]) -> None:
    counts = f"{figures['requests']:8g} {figures['errors']:6g}"
    print(
        f"{head} {counts} {figures['ttft_ms_p50']:9.0f} {figures['itl_ms_p50']:8.1f} {figures['tokens_per_s']:8.0f}",
        flush=True,
    )


def _figures(args: argparse.Namespace, arms: Mapping[tuple[float, str], Arm]) -> dict[str, Any]:
    """Everything by rate and arm, after a table of it; ratios are speculative ÷ plain."""
    found = {key: arm.figures(args) for key, arm in arms.items()}
    heads = [
        f"{f'{name} ms ' + ', '.join(f'p{p}' for p in PERCENTILES):>24}" for name in ("TTFT", "ITL")
    ]
    print(f"\n{'rate':>5} {'arm':12} {heads[0]} {heads[1]} {'tokens/s':>8} {'goodput':>8}")
    for (rate, arm), each in found.items():
        spreads = [
            " ".join(f"{each[f'{name}_p{p}']:7.1f}" for p in PERCENTILES)
            for name in ("ttft_ms", "itl_ms")
        ]
        print(
            f"{rate:5g} {arm:12} {spreads[0]:>24} {spreads[1]:>24} {each['tokens_per_s']:8.0f} {each['goodput']:8.0%}"
        )
    for error in sorted(
        {reply.error for arm in arms.values() for reply in arm.replies if reply.error}
    )[:5]:
        print(f"failed: {error}")
    ratio = lambda rate, name: round(
        found[rate, "speculative"][name] / max(1e-9, found[rate, "plain"][name]), 3
    )
    rates = _rates(args)
    return {
        "rates": {f"{rate:g}": {arm: found[rate, arm] for arm in ARMS} for rate in rates},
        **{
            f"{name}_ratio": {f"{rate:g}": ratio(rate, name) for rate in rates}
            for name in ("ttft_ms_p50", "itl_ms_p50")
        },
        "errors": sum(each["errors"] for each in found.values()),
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = np.percentile(seconds or [0.0], PERCENTILES) * 1000
    return {
        f"{name}_p{p}": round(float(value), 2) for p, value in zip(PERCENTILES, values, strict=True)
    }
