"""Text from tokens: whole characters only, and nothing of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from decoder.sequence.text import HfCodec, TextStream
from online.errors import InvalidRequest
from tests.tokenizer import VOCABULARY, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found: Tokenizer = make_tokenizer().backend_tokenizer
    return found


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_the_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    """Characters that span several tokens included."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = TextStream(tokenizer, ())
    assert "".join(stream.push(i) for i in ids) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text("abc", max_size=30), stop=st.text("abc", min_size=1, max_size=4))
def test_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, text: str, stop: str) -> None:
    """However it is tokenized, and after partial matches."""
    stream = TextStream(tokenizer, (stop,))
    seen = ""
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        seen += stream.push(token)
        if stream.stopped:
            break
    seen += stream.finish()
    assert seen == text.split(stop)[0]
    assert stream.stopped == (stop in text)


def test_an_incomplete_character_at_the_end_is_returned(tokenizer: Tokenizer) -> None:
    """As the replacement character that plain decoding gives."""
    half = tokenizer.encode("é", add_special_tokens=False).ids[:1]
    stream = TextStream(tokenizer, ())
    assert stream.push(half[0]) == ""
    assert stream.finish() == tokenizer.decode(half)


def test_bytes_that_form_no_character_do_not_raise() -> None:
    """Byte-fallback decoders rewrite earlier text; `tokenizers`' own stream raises on this."""
    vocabulary = (
        {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)} | {"▁a": 257, "b": 258}
    )
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    newline, first_byte = vocabulary["<0x0A>"], vocabulary["<0xE2>"]
    stream = TextStream(tokenizer, ())
    pieces = [stream.push(token) for token in (257, newline, first_byte, 258, 257)]
    assert pieces == ["a", "\n", "", "\ufffdb", " a"]
    assert stream.finish() == ""


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=30),
    stop=st.text("ab", min_size=1, max_size=2),
)
def test_no_tokens_raise(tokenizer: Tokenizer, ids: list[int], stop: str) -> None:
    """A model may emit any sequence of tokens."""
    stream = TextStream(tokenizer, (stop,))
    for token in ids:
        stream.push(token)
        if stream.stopped:
            return
    stream.finish()


def test_chats_use_the_models_own_template() -> None:
    """Without a template the request is refused."""
    tokenizer = make_tokenizer()
    codec = HfCodec(tokenizer, "tiny", VOCABULARY)
    ids = codec.encode_chat([{"role": "user", "content": "hi"}])
    assert codec.backend.decode(ids, skip_special_tokens=False) == "<|user|>hi<|assistant|>"
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        codec.encode_chat([{"role": "user", "content": "hi"}])
