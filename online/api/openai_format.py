"""Answers in OpenAI's shapes. Pure functions from deltas to JSON-ready dicts."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from online.messages import Delta, Query, SpeculationStats, TextCodec, TokenLogprob

Json = dict[str, Any]


@dataclass
class Answer:
    """One sequence as it grows."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stats = delta.stats or self.stats


@dataclass(frozen=True)
class Envelope:
    """What is the same in every piece of one response."""

    id: str
    chat: bool
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[Json], *, chunk: bool, **more: Any) -> Json:
        kind = (
            ("chat.completion.chunk" if chunk else "chat.completion")
            if self.chat
            else "text_completion"
        )
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, "system_fingerprint": self.fingerprint, **more}


def full_choice(
    index: int, answer: Answer, chat: bool, codec: TextCodec, with_logprobs: bool, with_ids: bool
) -> Json:
    logprobs = _logprobs(answer.logprobs, chat, codec) if with_logprobs else None
    choice: Json = {"index": index, "logprobs": logprobs, "finish_reason": answer.finish_reason}
    if chat:
        choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
    else:
        choice["text"] = answer.text
    if with_ids:
        choice["token_ids"] = answer.token_ids
    return choice


def chunk_choice(
    index: int, delta: Delta, chat: bool, codec: TextCodec, with_logprobs: bool, with_ids: bool
) -> Json:
    logprobs = _logprobs(delta.logprobs, chat, codec) if with_logprobs else None
    choice: Json = {"index": index, "logprobs": logprobs, "finish_reason": delta.finish_reason}
    if chat:
        choice["delta"] = {"content": delta.text}
    else:
        choice["text"] = delta.text
    if with_ids:
        choice["token_ids"] = list(delta.token_ids)
    return choice


def opening_choice(index: int) -> Json:
    """The first chunk of a chat choice, which names the speaker."""
    return {
        "index": index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> Json:
    completion = sum(len(answer.token_ids) for answer in answers)
    accepted = sum(answer.stats.accepted for answer in answers)
    drafted = sum(answer.stats.drafted for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def speculation_metrics(answers: Sequence[Answer], gamma: int, query: Query) -> Json | None:
    """vLLM's per-request acceptance metrics, and ours: Σ min(p, q), and the draft version of every token range.

    As in vLLM they describe one sequence, so there are none for several; but whether exactness was given up is told.
    """
    lenience = query.lenience
    rule = {
        "lossless": lenience is None or lenience.lossless,
        "lenience": lenience and asdict(lenience),
    }
    if len(answers) != 1:
        return None if rule["lossless"] else {"speculative_decoding": rule}
    stats = answers[0].stats
    tokens = len(answers[0].token_ids)
    return {
        "speculative_decoding": {
            "num_spec_steps": stats.steps,
            "num_draft_tokens": stats.drafted,
            "num_accepted_draft_tokens": stats.accepted,
            "num_spec_tokens": gamma,
            "mean_acceptance_length": 1 + stats.accepted / stats.steps if stats.steps else None,
            "draft_acceptance_rate": stats.accepted / stats.drafted if stats.drafted else None,
            "acceptance_histogram": {str(k): v for k, v in sorted(stats.histogram.items())},
            "acceptance_rate": stats.acceptance_rate,
            "tokens_per_target_forward": tokens / stats.steps if stats.steps else None,
            "draft_versions": [{"start": s, "end": e, "version": v} for s, e, v in stats.versions],
            "route": query.route,
            "drafter": query.drafter,
            **rule,
        }
    }


def _logprobs(logprobs: Sequence[TokenLogprob], chat: bool, codec: TextCodec) -> Json:
    if chat:
        return {"content": [_chat_logprob(entry, codec) for entry in logprobs], "refusal": None}
    tokens = [codec.token(entry.token_id) for entry in logprobs]
    offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=0)) if tokens else []
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [{codec.token(i): p for i, p in entry.top} for entry in logprobs],
        "text_offset": offsets,
    }


def _chat_logprob(entry: TokenLogprob, codec: TextCodec) -> Json:
    return {
        **_scored(entry.token_id, entry.logprob, codec),
        "top_logprobs": [_scored(token_id, logprob, codec) for token_id, logprob in entry.top],
    }


def _scored(token_id: int, logprob: float, codec: TextCodec) -> Json:
    token = codec.token(token_id)
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
