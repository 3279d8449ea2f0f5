"""The tokenizer as the API sees it, and the text of a growing sequence."""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from online.errors import InvalidRequest

REPLACEMENT = "\ufffd"  # decoded from bytes that form no character


class HfCodec:
    """`online.messages.TextCodec` over a `transformers` tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model_name: str, vocab_size: int
    ) -> None:
        self.model_name = model_name
        self.vocab_size = vocab_size
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant answers.

        Raises:
            InvalidRequest: no chat template, or it refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error}", param="messages"
            ) from error
        # The template already contains the special tokens.
        return self.backend.encode(str(rendered), add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """The text of one token, special tokens included."""
        return self.backend.decode([token_id], skip_special_tokens=False)


class TextStream:
    """Turns a sequence's tokens into text, and stops at a stop string.

    Holds back text that may become part of a stop string. Never raises,
    whatever the tokens: bytes that form no character become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._held = ""
        self._shown: list[int] = []  # decoded last; context for the next tokens
        self._pending: list[int] = []  # not whole characters yet
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds a token, and returns the text that is now final.

        At a stop string, `stopped` becomes true, and the text ends before
        that string.
        """
        self._pending.append(token_id)
        piece = self._new_text()
        if not piece and self._shown:
            self._pending.clear()  # a special token, without text
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        self._shown, self._pending = self._pending, []
        return self._release(piece, final=False)

    def finish(self) -> str:
        """The remaining text at the end: held-back text and incomplete characters."""
        return "" if self.stopped else self._release(self._new_text(), final=True)

    def _new_text(self) -> str:
        """The text of the pending tokens, decoded after the shown ones.

        Decoders treat the first token of a text differently.
        """
        shown = self._decode(self._shown)
        return self._decode(self._shown + self._pending)[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._held + piece
        cuts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        overlaps = (_overlap(text, stop) for stop in self._stop)
        held = 0 if final else max(overlaps, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
