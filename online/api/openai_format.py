"""OpenAI's formats: pure functions from the engine's deltas to JSON-ready dicts."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from online.messages import Delta, Query, SpeculationStats, TextCodec, TokenLogprob

Json = dict[str, Any]


@dataclass
class Answer:
    """The deltas of one sequence, added up."""

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
    """The fields that every piece of one response has."""

    id: str
    chat: bool
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[Json], *, chunk: bool, **more: Any) -> Json:
        head = {"id": self.id, "object": self._kind(chunk), "created": self.created}
        body = {"model": self.model, "choices": choices, "system_fingerprint": self.fingerprint}
        return {**head, **body, **more}

    def _kind(self, chunk: bool) -> str:
        if not self.chat:
            return "text_completion"
        return "chat.completion.chunk" if chunk else "chat.completion"


@dataclass(frozen=True)
class ChoiceFormat:
    """How the choices of one response look."""

    chat: bool
    codec: TextCodec
    with_logprobs: bool
    with_ids: bool

    def full(self, index: int, answer: Answer) -> Json:
        """A complete answer."""
        choice = self._choice(index, answer.finish_reason, answer.logprobs)
        if self.chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        if self.with_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def chunk(self, index: int, delta: Delta) -> Json:
        """One piece of a streamed answer."""
        choice = self._choice(index, delta.finish_reason, delta.logprobs)
        if self.chat:
            choice["delta"] = {"content": delta.text}
        else:
            choice["text"] = delta.text
        if self.with_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _choice(self, index: int, reason: str | None, logprobs: Sequence[TokenLogprob]) -> Json:
        shown = self._logprobs(logprobs) if self.with_logprobs else None
        return {"index": index, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        if self.chat:
            content = [_chat_logprob(entry, self.codec) for entry in logprobs]
            return {"content": content, "refusal": None}
        return _completion_logprobs(logprobs, self.codec)


def opening_choice(index: int) -> Json:
    """The first chunk of a chat choice: it holds the role."""
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


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
    """vLLM's acceptance metrics of a request, and ours.

    Like vLLM's, they describe one sequence. A request with several has no metrics, except that
    lossy decoding is always reported.
    """
    lenience = query.lenience
    rule = {
        "lossless": lenience is None or lenience.lossless,
        "lenience": lenience and asdict(lenience),
    }
    if len(answers) == 1:
        figures = _speculation_figures(answers[0], gamma)
        asked = {"route": query.route, "drafter": query.drafter}
        return {"speculative_decoding": {**figures, **asked, **rule}}
    return None if rule["lossless"] else {"speculative_decoding": rule}


def _speculation_figures(answer: Answer, gamma: int) -> Json:
    stats = answer.stats
    steps, drafted, accepted = stats.steps, stats.drafted, stats.accepted
    return {
        "num_spec_steps": steps,
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": accepted,
        "num_spec_tokens": gamma,
        "mean_acceptance_length": 1 + accepted / steps if steps else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_histogram": {str(k): v for k, v in sorted(stats.histogram.items())},
        "acceptance_rate": stats.acceptance_rate,
        "tokens_per_target_forward": len(answer.token_ids) / steps if steps else None,
        "draft_versions": [{"start": s, "end": e, "version": v} for s, e, v in stats.versions],
    }


def _completion_logprobs(logprobs: Sequence[TokenLogprob], codec: TextCodec) -> Json:
    tokens = [codec.token(entry.token_id) for entry in logprobs]
    offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=0)) if tokens else []
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [{codec.token(i): p for i, p in entry.top} for entry in logprobs],
        "text_offset": offsets,
    }


def _chat_logprob(entry: TokenLogprob, codec: TextCodec) -> Json:
    top = [_scored(token_id, logprob, codec) for token_id, logprob in entry.top]
    return {**_scored(entry.token_id, entry.logprob, codec), "top_logprobs": top}


def _scored(token_id: int, logprob: float, codec: TextCodec) -> Json:
    token = codec.token(token_id)
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
