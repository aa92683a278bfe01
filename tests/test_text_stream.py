"""The text of an answer up to a stop string: `pytest tests/test_text_stream.py`, about 10 s"""

import pytest
from helpers.tiny_tokenizers import of_all_kinds
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import InputError, Tokenizer
from lit_gpt.generate.text_stream import TextStream

# few characters, so that stop strings are there, overlap, and begin in vain; of one to four bytes
TEXT = st.text("ab \n.é世🦜", max_size=30)
STOP = st.lists(st.text("ab \n.é世🦜", min_size=1, max_size=5), max_size=3)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, sample_dir) -> dict[str, Tokenizer]:
    return of_all_kinds(tmp_path_factory.mktemp("kinds"), sample_dir)


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """A text before the stop string that is complete first, character by character, and whether there is one."""
    for end in range(1, len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)], True
    return text, False


def may_begin(text: str, stop: list[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)


@pytest.mark.parametrize("kind", ["sample", "byte-level", "metaspace", "sentencepiece"])
@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(TEXT, max_size=4), stop=STOP)
def test_a_stream_is_a_search_in_the_whole_text(kinds, kind: str, pieces: list[str], stop: list[str]) -> None:
    """However a text is split into tokens. At each moment all is said that cannot be the beginning of a stop string."""
    tokenizer = kinds[kind]
    ids = [token for piece in pieces for token in tokenizer.encode(piece, bos=False).tolist()]
    expected, stops = cut(tokenizer.decode(ids), stop)
    stream = TextStream(tokenizer, stop)
    said = ""
    certain = ""
    decoded = TextStream(tokenizer)
    for token in ids:
        said += stream.push(token)
        certain += decoded.push(token)
        if not stream.stopped:
            assert said == certain[: len(certain) - may_begin(certain, stop)]
    said += stream.end()
    assert (said, stream.stopped) == (expected, stops)
    assert stream.push(ids[0] if ids else 5) == "" or not stops


def test_where_a_stop_string_lies_in_the_tokens(kinds) -> None:
    tokenizer = kinds["sample"]

    def said(text: str, *stop: str) -> list[str]:
        stream = TextStream(tokenizer, stop)
        parts = [stream.push(token) for token in tokenizer.encode(text).tolist()]
        return [*parts, stream.end()]

    text = "one two three four"
    assert said(text) == ["one", " two", " three", " four", ""]
    assert said(text, "hre") == ["one", " two", " t", "", ""]  # in the middle of a token
    assert said(text, "o t") == ["one", " tw", "", "", ""]  # at the end of one and in the next
    assert said(text, "two three") == ["one", " ", "", "", ""]
    assert said(text, "two thirds") == ["one", " ", "two three", " four", ""]  # begun in vain
    assert said(text, " four!") == ["one", " two", " three", "", " four"]  # and at the end
    assert said(text, "wo", "two") == ["one", " ", "", "", ""]  # both end there: the longest
    assert said(text, "two three", "thr") == ["one", " ", "two ", "", ""]  # the one that is complete first


def test_the_end_in_the_middle_of_a_character(kinds) -> None:
    tokenizer = kinds["sample"]
    ids = tokenizer.encode("a🦜").tolist()
    for stop in ((), ("\N{REPLACEMENT CHARACTER}",)):
        stream = TextStream(tokenizer, stop)
        said = "".join([stream.push(token) for token in ids[:-1]])
        assert said == "a"
        assert said + stream.end() == ("a" if stop else tokenizer.decode(ids[:-1]))
        assert stream.stopped == bool(stop)


def test_an_empty_stop_string_is_refused(kinds) -> None:
    with pytest.raises(InputError, match="A stop string is empty"):
        TextStream(kinds["sample"], ["a", ""])
