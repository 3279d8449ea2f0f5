"""Text in and out: the tokenizer as the API sees it, and each row's growing text with its stop strings."""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from online.errors import InvalidRequest


class HfCodec:
    """`online.messages.TextCodec` over a `transformers` tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model_name: str, vocab_size: int) -> None:
        self.model_name = model_name
        self.vocab_size = vocab_size
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Raises InvalidRequest where the model has no chat template, or its template refuses the messages."""
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error}", param="messages"
            ) from error
        # The template writes the special tokens itself.
        return self.backend.encode(str(rendered), add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        return self.backend.decode([token_id], skip_special_tokens=False)


class TextStream:
    """One row's text as its tokens come. Text that may yet turn into a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self._ids: list[int] = []
        self._seen = 0  # characters decoded so far, held or not
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that this token makes certain. After a stop string `stopped` is true, and the string is cut off."""
        self._ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id) or ""
        self._seen += len(piece)
        return self._release(piece, final=False)

    def finish(self) -> str:
        """What is left at the end: held-back text, and bytes that never became a whole character."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._release(whole[self._seen :], final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._held + piece
        cuts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
