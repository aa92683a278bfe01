"""Text to tokens and back, by both backends: `pytest tests/test_tokenizer.py`, about 15 s"""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_tokenizers import SPECIAL, TEXTS, byte_level, metaspace, sentencepiece, write
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import InputError, Tokenizer

# without what the sample's vocabulary has no bytes for, unassigned planes and control characters, and without U+FFFD,
# which is what must not appear
CHARACTERS = st.characters(
    exclude_categories=["Cs", "Cn", "Co", "Cc"],
    exclude_characters="\N{REPLACEMENT CHARACTER}",
    include_characters="\n\r\t",
)
UNICODE = st.lists(st.text(CHARACTERS, max_size=8) | st.sampled_from(TEXTS), max_size=5).map("".join)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, sample_dir) -> dict[str, Tokenizer]:
    """Of both backends."""
    root = tmp_path_factory.mktemp("kinds")
    return {
        "sample": Tokenizer(sample_dir),
        "byte-level": Tokenizer(write(root / "1", tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL)),
        "metaspace": Tokenizer(write(root / "2", tokenizer_json=metaspace(), tokenizer_config_json=SPECIAL)),
        "sentencepiece": Tokenizer(write(root / "3", tokenizer_model=sentencepiece(), tokenizer_config_json=SPECIAL)),
    }


def test_the_sample_encodes_as_transformers_does(kinds, sample_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, reference = kinds["sample"], AutoTokenizer.from_pretrained(sample_dir)
    assert tokenizer.backend == "tokenizers" and not tokenizer.use_bos
    for text, encoded in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        expected = reference(text).input_ids
        assert encoded.ids == expected == tokenizer.encode(text).tolist()
        assert tokenizer.decode(expected) == reference.decode(expected, skip_special_tokens=True)
        assert tokenizer.decode_with_special(expected) == reference.decode(expected) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert tokenizer.vocab_size == len(reference)


def test_encode_and_its_arguments(kinds) -> None:
    tokenizer = kinds["sample"]
    plain = tokenizer.encode("one two three")
    assert plain.dtype == torch.int64 and plain.ndim == 1
    assert tokenizer.encode("one two three", bos=True, eos=True).tolist() == [1, *plain.tolist(), 2]
    assert tokenizer.encode("one two three", bos=True, max_length=2).tolist() == [1, plain[0].item()]
    assert tokenizer.encode("", max_length=0).tolist() == []
    assert tokenizer.encode("one", device=torch.device("meta")).device.type == "meta"
    assert tokenizer.decode(plain) == tokenizer.decode(plain.tolist()) == "one two three"


@pytest.mark.parametrize("kind", ["sample", "byte-level", "metaspace", "sentencepiece"])
@settings(max_examples=60, deadline=None)
@given(text=UNICODE)
def test_there_and_back(kinds, kind: str, text: str) -> None:
    """Nothing is lost; offsets cover the text in order; a stream says what decoding says, in whole characters."""
    tokenizer = kinds[kind]
    encoded = tokenizer.encode_batch([text], bos=False)[0]
    assert tokenizer.decode_with_special(encoded.ids) == text
    starts, ends = [start for start, _ in encoded.offsets], [end for _, end in encoded.offsets]
    assert (
        starts == sorted(starts) and ends == sorted(ends) and all(0 <= s <= e <= len(text) for s, e in encoded.offsets)
    )
    covered = {i for start, end in encoded.offsets for i in range(start, end)}
    assert all(text[i].isspace() for i in range(len(text)) if i not in covered)

    parts = list(tokenizer.stream(encoded.ids))
    assert "".join(parts) == tokenizer.decode(encoded.ids)
    assert "" not in parts and not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_a_stream_does_not_wait(kinds) -> None:
    """Each word comes when its token does; a character of several tokens when it is whole."""
    tokenizer = kinds["sample"]
    ids = tokenizer.encode("one two 🦜 three").tolist()
    seen, given = [], iter(ids)
    stream = tokenizer.stream(seen.append(token) or token for token in given)
    assert next(stream) == "one" and len(seen) == 1
    assert next(stream) == " two" and len(seen) == 2
    assert "".join(stream) == " 🦜 three"
    # what ends in the middle of a character is still said
    assert "".join(tokenizer.stream(ids[:4])) == tokenizer.decode(ids[:4])
    assert tokenizer.decode(ids[:4]).endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("asked", [True, False, None, "unsaid"])
@pytest.mark.parametrize("backend", ["adds", "does not", "sentencepiece"])
def test_bos_exactly_once(tmp_path: Path, backend: str, asked) -> None:
    """tokenizer_config.json decides; where it is silent the tokenizer itself does."""
    model = sentencepiece() if backend == "sentencepiece" else None
    files = {"tokenizer_model": model} if model else {"tokenizer_json": byte_level(post_bos=backend == "adds")}
    config = SPECIAL if asked == "unsaid" else SPECIAL | {"add_bos_token": asked}
    tokenizer = Tokenizer(write(tmp_path, tokenizer_config_json=config, **files))
    bos = tokenizer.bos_id
    expected = asked if isinstance(asked, bool) else backend != "does not"
    for text in ("hello", "", "a<s>b"):
        ids = tokenizer.encode(text).tolist()
        assert ids.count(bos) == expected + text.count("<s>") and (ids[:1] == [bos]) == expected
        assert tokenizer.encode_batch([text])[0].ids == ids
        assert tokenizer.encode(text, bos=True).tolist()[0] == bos
        assert tokenizer.encode(text, bos=False).tolist() == (ids[1:] if expected else ids)
    written = tokenizer.encode("<s>hello").tolist()
    assert written[0] == bos and written.count(bos) == 1
    assert tokenizer.decode(written) == "hello" and tokenizer.decode_with_special(written) == "<s>hello"
    if expected:
        assert tokenizer.encode_batch(["hello"])[0].offsets[0] == (0, 0)


def test_a_tokenizer_without_bos(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, tokenizer_json=byte_level(), tokenizer_config_json={"eos_token": "</s>"}))
    assert tokenizer.bos_id is None and not tokenizer.use_bos
    with pytest.raises(InputError, match="no BOS"):
        tokenizer.encode("a", bos=True)


def test_sentencepiece_special_tokens_and_offsets(kinds) -> None:
    tokenizer = kinds["sentencepiece"]
    assert tokenizer.backend == "sentencepiece" and tokenizer.use_bos
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, {2})
    text = "<s>[INST] Größe 🦜 [/INST] 日</s>"
    encoded = tokenizer.encode_batch([text])[0]
    assert encoded.ids[0] == 1 and encoded.ids[-1] == 2 and encoded.ids.count(1) == 1
    assert encoded.offsets[0] == (0, 3) and encoded.offsets[-1] == (len(text) - 4, len(text))
    # plain text is what sentencepiece itself makes of it; the parrot is unknown and becomes its four bytes
    assert encoded.ids[1:-1] == tokenizer.processor.encode(text[3:-4])
    pieces = [tokenizer.id_to_token(i) for i in encoded.ids]
    parrot = [f"<0x{byte:02X}>" for byte in "🦜".encode()]
    at = pieces.index(parrot[0])
    assert pieces[at : at + 4] == parrot
    assert encoded.offsets[at][0] == text.index("🦜") and encoded.offsets[at + 3][1] == text.index("🦜") + 1
    assert tokenizer.decode(encoded.ids) == "[INST] Größe 🦜 [/INST] 日"


def test_fingerprints(tmp_path: Path, kinds, sample_dir: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(sample_dir).save_pretrained(tmp_path / "again")
    again = Tokenizer(tmp_path / "again")
    assert again.fingerprint == kinds["sample"].fingerprint
    assert again.chat_template == kinds["sample"].chat_template and again.stop_ids == kinds["sample"].stop_ids

    content = json.loads((sample_dir / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merges[1], merges[0], *merges[2:]]
    other = write(tmp_path / "merges", tokenizer_json=content, tokenizer_config_json={"eos_token": "<|im_end|>"})
    fingerprints = {kind: tokenizer.fingerprint for kind, tokenizer in kinds.items()} | {
        "": Tokenizer(other).fingerprint
    }
    assert len(set(fingerprints.values())) == len(fingerprints)
    more = write(
        tmp_path / "more", tokenizer_json=byte_level(tokens=["<s>", "</s>", "<x>"]), tokenizer_config_json=SPECIAL
    )
    assert Tokenizer(more).fingerprint != fingerprints["byte-level"]


DAMAGED = {
    "no tokenizer": (dict(tokenizer_config_json=SPECIAL), "no tokenizer.json"),
    "not json": (dict(tokenizer_json="{]", tokenizer_config_json=SPECIAL), "cannot be read"),
    "cut off": (dict(tokenizer_json='{"version": "1.0", "mod', tokenizer_config_json=SPECIAL), "cannot be read"),
    "not text": (dict(tokenizer_json=b"\xff\xfe\x00", tokenizer_config_json=SPECIAL), "cannot be read"),
    "no sentencepiece": (dict(tokenizer_model=b"nonsense", tokenizer_config_json=SPECIAL), "cannot be read"),
    "empty sentencepiece": (dict(tokenizer_model=b"", tokenizer_config_json=SPECIAL), "cannot be read"),
    "damaged config": (dict(tokenizer_json="{}", tokenizer_config_json="{"), "tokenizer_config.json is not readable"),
    "config is a list": (dict(tokenizer_json="{}", tokenizer_config_json="[]"), "holds a list"),
    "no eos": (
        dict(tokenizer_json=byte_level(), tokenizer_config_json={"bos_token": "<s>"}),
        "neither names an eos_token",
    ),
    "unknown eos": (dict(tokenizer_json=byte_level(), tokenizer_config_json={"eos_token": "<e>"}), "<e>"),
    "template in latin-1": (
        dict(tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL, chat_template_jinja="é".encode("latin-1")),
        "chat_template.jinja is not UTF-8",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_missing_files(tmp_path: Path, name: str) -> None:
    files, said = DAMAGED[name]
    with pytest.raises(InputError, match=said):
        Tokenizer(write(tmp_path, **files))


def test_a_cut_off_sentencepiece_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer(write(tmp_path, tokenizer_model=sentencepiece()[:1000], tokenizer_config_json=SPECIAL))


@pytest.mark.parametrize(
    "settings, generation, model, eos_id, stop_ids",
    [
        (SPECIAL, {"eos_token_id": [1, 7]}, {}, 1, {1, 7}),
        (SPECIAL, {"eos_token_id": 7}, {}, 1, {1, 7}),
        (SPECIAL, {}, {"eos_token_id": 8}, 1, {1, 8}),
        (SPECIAL, {"eos_token_id": 7}, {"eos_token_id": 8}, 1, {1, 7}),
        (SPECIAL, {}, {}, 1, {1}),
        ({}, {"eos_token_id": [9, 7]}, {}, 9, {7, 9}),
        ({"eos_token": {"content": "</s>", "lstrip": False}}, {}, {}, 1, {1}),
    ],
)
def test_what_ends_an_answer(tmp_path: Path, settings, generation, model, eos_id: int, stop_ids: set[int]) -> None:
    files = dict(tokenizer_config_json=settings, generation_config_json=generation, config_json=model)
    tokenizer = Tokenizer(write(tmp_path, tokenizer_json=byte_level(), **files))
    assert tokenizer.eos_id == eos_id and tokenizer.stop_ids == stop_ids


def test_the_three_places_of_a_chat_template(tmp_path: Path) -> None:
    def template(name: str, settings: dict, **files) -> str | None:
        config = SPECIAL | settings
        return Tokenizer(
            write(tmp_path / name, tokenizer_json=byte_level(), tokenizer_config_json=config, **files)
        ).chat_template

    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert template("nowhere", {}) is None
    assert template("text", {"chat_template": "yes"}) == "yes"
    assert template("several", {"chat_template": several}) == "yes"
    assert template("others", {"chat_template": several[:1]}) is None
    assert template("file", {"chat_template": "no"}, chat_template_jinja="yes 🙂") == "yes 🙂"


@pytest.mark.parametrize(
    ("settings", "generation", "message"),
    [
        ({}, {"eos_token_id": [[2]]}, r"the eos_token_id is \[\[2\]\], expected one number"),
        ({}, {"eos_token_id": 1.5}, "the eos_token_id is 1.5, expected one number"),
        ({"eos_token": 5}, {}, "holds a value that cannot be used"),
        ({"eos_token": {"a": 1}}, {}, "has no 'content'"),
        ({"chat_template": [{"name": "default"}]}, {}, "has no 'template'"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, generation, message, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", tokenizer_json=byte_level(), tokenizer_config_json={"eos_token": "</s>"} | settings)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(InputError, match=f"x, its tokenizer_config.json or generation_config.json:? .*{message}"):
        Tokenizer(folder)
