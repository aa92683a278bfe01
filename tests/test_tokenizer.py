"""Text to tokens and back, by both backends: `pytest tests/test_tokenizer.py`, about 20 s"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_tokenizers import SPECIAL, TEXTS, byte_level, of_all_kinds, sentencepiece, write
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
    return of_all_kinds(tmp_path_factory.mktemp("kinds"), sample_dir)


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
    """tokenizer.json says it itself, whatever stands beside it; for a tokenizer.model add_bos_token does."""
    model = sentencepiece() if backend == "sentencepiece" else None
    files = {"tokenizer_model": model} if model else {"tokenizer_json": byte_level(post_bos=backend == "adds")}
    config = SPECIAL if asked == "unsaid" else SPECIAL | {"add_bos_token": asked}
    tokenizer = Tokenizer(write(tmp_path, tokenizer_config_json=config, **files))
    bos = tokenizer.bos_id
    expected = asked if isinstance(asked, bool) and model else backend != "does not"
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


# ---- tokens that are added


def added(content: str, **flags: bool) -> dict:
    """As tokenizer_config.json has it in its added_tokens_decoder."""
    return dict(content=content, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True) | flags


NAMED = SPECIAL | {"unk_token": "<unk>"}
SENTENCES = [
    *TEXTS[:9],
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a <|im_end|>  b <|im_start|><|im_end|>",
    "<s> hi</s> x <unk>",
    " <think> so </think>\n\n",
    "word sword word. words hi",
]
N = 400  # pieces of the tokenizer.model of these tests
BESIDE_A_MODEL = {  # what stands beside tokenizer.model, and the same for transformers' slow tokenizer
    "nothing": ({}, {}),
    "added_tokens.json": (
        {"added_tokens_json": {"<|im_start|>": N, "<|im_end|>": N + 1}},
        {"added_tokens_decoder": {N: added("<|im_start|>", special=False), N + 1: added("<|im_end|>", special=False)}},
    ),
    "a list alone": (
        {"special_tokens_map_json": NAMED | {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
        {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    ),
    "added_tokens_decoder": (
        {"decoder": {N: added("<|im_start|>", rstrip=True), N + 1: added("<|im_end|>", lstrip=True)}},
        {"added_tokens_decoder": {N: added("<|im_start|>", rstrip=True), N + 1: added("<|im_end|>", lstrip=True)}},
    ),
    "ids with gaps, not special": (
        {"decoder": {N + 7: added("<think>", special=False), N + 3: added("</think>", special=False)}},
        {"added_tokens_decoder": {N + 7: added("<think>", special=False), N + 3: added("</think>", special=False)}},
    ),
    "one begins like another": (
        {"decoder": {N: added("<|im"), N + 1: added("<|im_start|>")}},
        {"added_tokens_decoder": {N: added("<|im"), N + 1: added("<|im_start|>")}},
    ),
    "a single word": (
        {"decoder": {N: added("word", single_word=True)}},
        {"added_tokens_decoder": {N: added("word", single_word=True)}},
    ),
    "in the vocabulary, too": (
        {"decoder": {N: added("hi")}},
        {"added_tokens_decoder": {N: added("hi")}},
    ),
    "in place of a piece": ({"decoder": {300: added("<think>")}}, {"added_tokens_decoder": {300: added("<think>")}}),
}


def beside_a_model(folder: Path, files: dict, **settings) -> Path:
    files = dict(files)
    decoder = {"added_tokens_decoder": files.pop("decoder")} if "decoder" in files else {}
    config = NAMED | decoder | settings
    return write(folder, tokenizer_model=sentencepiece(), tokenizer_config_json=config, **files)


@pytest.mark.parametrize("place", BESIDE_A_MODEL)
def test_added_tokens_of_a_tokenizer_model_are_those_of_transformers(tmp_path: Path, place: str) -> None:
    from transformers import AddedToken
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    files, theirs = BESIDE_A_MODEL[place]
    tokenizer = Tokenizer(beside_a_model(tmp_path, files))
    theirs = dict(theirs)
    if "added_tokens_decoder" in theirs:
        decoder = {i: AddedToken(**token) for i, token in theirs["added_tokens_decoder"].items()}
        theirs["added_tokens_decoder"] = decoder
    slow = SentencePieceBackend(vocab_file=str(tmp_path / "tokenizer.model"), legacy=True, **NAMED, **theirs)
    assert tokenizer.processor.vocab_size() == N
    for text in SENTENCES:
        encoded = tokenizer.encode_batch([text], bos=False)[0]
        assert encoded.ids == slow.encode(text, add_special_tokens=False), text
        assert all(0 <= start <= end <= len(text) for start, end in encoded.offsets)
        assert encoded.offsets == sorted(encoded.offsets)
    assert all(tokenizer.token_to_id(content) == i for content, i in slow.get_added_vocab().items())


def test_only_the_first_piece_gets_a_space_where_legacy_is_false(tmp_path: Path) -> None:
    files, _ = BESIDE_A_MODEL["added_tokens.json"]
    files = files | {"special_tokens_map_json": NAMED | {"additional_special_tokens": ["<|im_start|>"]}}
    marked = "Hello<|im_end|>lo <|im_start|>user"
    expected = {True: "▁Hello<|im_end|>▁lo▁<|im_start|>▁user", False: "▁Hello<|im_end|>lo▁<|im_start|>user"}
    for legacy in (True, False):
        tokenizer = Tokenizer(beside_a_model(tmp_path / str(legacy), files, legacy=legacy))
        encoded = tokenizer.encode_batch([marked], bos=False)[0]
        assert "".join(map(tokenizer.id_to_token, encoded.ids)) == expected[legacy]
        for text in (*SENTENCES[:11], marked, " a", "<|im_start|> a"):
            encoded = tokenizer.encode_batch([text], bos=False)[0]
            assert tokenizer.decode_with_special(encoded.ids) == text
            assert encoded.offsets == sorted(encoded.offsets)
            assert "".join(tokenizer.stream(encoded.ids)) == tokenizer.decode(encoded.ids)
    # a marker that settings name is not preceded by the space of the text; ids of transformers 4's slow tokenizer
    ids = tokenizer.encode("<|im_start|>user", bos=False).tolist()
    assert tokenizer.id_to_token(ids[0]) == "<|im_start|>"
    none = Tokenizer(beside_a_model(tmp_path / "none", files, legacy=False, add_prefix_space=False))
    assert none.decode_with_special(none.encode("Hello", bos=False).tolist()) == "Hello"
    assert not none.id_to_token(none.encode("Hello", bos=False)[0].item()).startswith("▁")


def test_ids_without_a_token_decode_to_nothing(tmp_path: Path) -> None:
    """A model has more rows than its tokenizer has tokens, and may say any of them."""
    files, _ = BESIDE_A_MODEL["ids with gaps, not special"]
    folders = [
        beside_a_model(tmp_path / "model", files),
        write(tmp_path / "json", tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL),
    ]
    for folder in folders:
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode("Hello world", bos=False).tolist()
        beyond = [tokenizer.vocab_size, 10**6, tokenizer.vocab_size + 7]
        padded = [*ids, *beyond, tokenizer.eos_id]
        assert tokenizer.decode(padded) == "Hello world" == "".join(tokenizer.stream(padded))
        assert tokenizer.decode_with_special(padded) == "Hello world</s>"
        assert tokenizer.decode(beyond) == ""
        with pytest.raises(InputError, match="has no token 1000000"):
            tokenizer.id_to_token(10**6)
    model = Tokenizer(folders[0])
    assert model.vocab_size == N + 8 and model.decode([N, N + 3, N + 5, N + 7]) == "</think><think>"


def test_added_tokens_are_in_the_fingerprint(tmp_path: Path) -> None:
    folders = [beside_a_model(tmp_path / place, BESIDE_A_MODEL[place][0]) for place in ("nothing", "added_tokens.json")]
    plain, marked = map(Tokenizer, folders)

    assert plain.fingerprint == hashlib.sha256(plain.processor.serialized_model_proto()).hexdigest()
    assert marked.fingerprint != plain.fingerprint and marked.behaviour != plain.behaviour
    # a name without an id is no token of the model's, and adapters go on
    pad = Tokenizer(beside_a_model(tmp_path / "pad", {}, pad_token="[PAD]"))
    assert pad.fingerprint == plain.fingerprint and pad.encode("[PAD]", bos=False).tolist() == [N]


@pytest.mark.parametrize(
    "files, said",
    [
        ({"decoder": {"5": added("</s>")}}, "has the token '</s>' under the id 2, its neighbours give it the id 5"),
        ({"added_tokens_json": {"<a>": 401, "<b>": 401}}, "gives two tokens the id 401: '<a>' and '<b>'"),
        ({"added_tokens_json": {"<a>": -1}}, "gives the token '<a>' the id -1, expected 0 or more"),
        ({"added_tokens_json": {"<a>": "401"}}, "gives the token '<a>' the id '401'"),
        ({"added_tokens_json": "{"}, "added_tokens.json is not readable as JSON"),
        ({"special_tokens_map_json": {"pad_token": 5}}, "holds a value that cannot be used"),
        ({"decoder": {"x": added("<a>")}}, "added_tokens_decoder, holds a value that cannot be used"),
        ({"decoder": {"401": {}}}, "added_tokens_decoder, has no 'content'"),
    ],
)
def test_added_tokens_that_do_not_fit_are_named(files: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        Tokenizer(beside_a_model(tmp_path, files))


BESIDE_A_JSON = {
    "added_tokens_decoder": ({"added_tokens_decoder": {"300": added("<|x|>", rstrip=True), "301": added("<|y|>")}}, {}),
    "added_tokens.json": ({}, {"added_tokens_json": {"<|x|>": 300, "<|y|>": 301}}),
    "a list": ({"additional_special_tokens": ["<|x|>"], "pad_token": "<|y|>"}, {}),
    "special_tokens_map.json": ({}, {"special_tokens_map_json": SPECIAL | {"additional_special_tokens": ["<|x|>"]}}),
    "other flags": ({"added_tokens_decoder": {"0": added("<s>", rstrip=True), "1": added("</s>", special=False)}}, {}),
}


@pytest.mark.parametrize("place", BESIDE_A_JSON)
def test_added_tokens_beside_a_tokenizer_json_are_those_of_transformers(tmp_path: Path, place: str) -> None:
    from transformers import AutoTokenizer

    settings, files = BESIDE_A_JSON[place]
    config = SPECIAL | {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    folder = write(tmp_path, tokenizer_json=byte_level(), tokenizer_config_json=config, **files)
    tokenizer, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("a<|x|> b<|y|>", "<|x|><|y|>  <s> x </s>", "plain"):
        ids = tokenizer.encode(text).tolist()
        assert ids == theirs(text).input_ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_token_that_tokenizer_json_would_give_another_id(tmp_path: Path) -> None:
    files = dict(tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL, added_tokens_json={"<|x|>": 305})
    with pytest.raises(InputError, match="does not have the token '<|x|>', .* the id 305: there it would be 300"):
        Tokenizer(write(tmp_path, **files))


# ---- BOS


def with_post_processor(kind: str) -> str:
    """A tokenizer.json whose post-processor is of this kind."""
    from tokenizers import Tokenizer as HF
    from tokenizers import processors

    tokenizer = HF.from_str(byte_level())
    names = [("<s>", 0), ("</s>", 1)]
    pieces = {"bos": ["<s>", "$A"], "eos": ["$A", "</s>"], "both": ["<s>", "$A", "</s>"]}
    if kind in pieces:
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces[kind], special_tokens=names)
    if kind == "byte level":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer.to_str()


@pytest.mark.parametrize("kind", ["none", "bos", "eos", "both", "byte level"])
def test_bos_is_where_transformers_puts_it(tmp_path: Path, kind: str) -> None:
    """Whatever add_bos_token says, and whatever token config.json names."""
    from transformers import AutoTokenizer

    model = {"model_type": "llama", "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    n = 0
    for asked in ("unsaid", True, False, None):
        for named in ("unsaid", "<s>", None):
            config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
            config |= {} if asked == "unsaid" else {"add_bos_token": asked, "add_eos_token": asked}
            config |= {} if named == "unsaid" else {"bos_token": named}
            files = dict(tokenizer_json=with_post_processor(kind), tokenizer_config_json=config, config_json=model)
            folder = write(tmp_path / str(n), **files)
            n += 1
            expected = AutoTokenizer.from_pretrained(folder)("a").input_ids
            # an end is put where it belongs by the data, not behind a prompt
            expected = [i for i in expected if i != 1]
            tokenizer = Tokenizer(folder)
            assert tokenizer.encode("a").tolist() == expected
            assert (tokenizer.bos_id is None) == (kind not in ("bos", "both") and named != "<s>")


LIKE = {  # what the files of well-known models say: post-processor, tokenizer_config.json, config.json; is there BOS?
    "Qwen2.5": ("byte level", {"bos_token": None, "add_bos_token": False}, {"bos_token_id": 0}, False),
    "Llama 3": ("bos", {"bos_token": "<s>"}, {"bos_token_id": 0}, True),
    "Gemma, Mistral": ("bos", {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": False}, {}, True),
    "GPT-2, phi-4": ("byte level", {"bos_token": "</s>", "add_bos_token": False}, {"bos_token_id": 1}, False),
    "Falcon": ("byte level", {}, {"bos_token_id": 1}, False),
    "DeepSeek": ("byte level", {"bos_token": "<s>", "add_bos_token": True}, {"bos_token_id": 0}, False),
    "SmolLM": ("none", {"bos_token": "<s>"}, {"bos_token_id": 0}, False),
    "without tokenizer_config.json": ("bos", None, {"bos_token_id": 1, "eos_token_id": 1}, True),
}


@pytest.mark.parametrize("name", LIKE)
def test_bos_of_well_known_models(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    kind, settings, model, has_bos = LIKE[name]
    files = {} if settings is None else {"tokenizer_config_json": {"eos_token": "</s>"} | settings}
    model = {"model_type": "llama", "vocab_size": 300} | model
    folder = write(tmp_path, tokenizer_json=with_post_processor(kind), config_json=model, **files)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("Hello world").tolist()
    assert ids == AutoTokenizer.from_pretrained(folder)("Hello world").input_ids
    assert (ids[0] == 0) == has_bos == tokenizer.use_bos
    if "bos_token" in (settings or {}) and settings["bos_token"] is None:
        assert "bos_token" not in tokenizer.special_tokens


def test_bos_of_a_tokenizer_model(tmp_path: Path) -> None:
    """Its own, unless the settings say that there is none; config.json is not asked."""
    files = dict(tokenizer_model=sentencepiece(), config_json={"bos_token_id": 5, "eos_token_id": 2})
    for n, (said, expected) in enumerate(
        [
            ({}, [1]),
            ({"bos_token": None, "eos_token": "</s>"}, []),
            ({"bos_token": "<s>", "add_bos_token": False}, []),
            ({"bos_token": "</s>"}, [2]),
        ]
    ):
        tokenizer = Tokenizer(write(tmp_path / str(n), **files, tokenizer_config_json=said))
        plain = tokenizer.encode("Hello", bos=False).tolist()
        assert tokenizer.encode("Hello").tolist() == [*expected, *plain]
    bare = Tokenizer(write(tmp_path / "bare", tokenizer_model=sentencepiece()))
    assert (bare.bos_id, bare.eos_id, bare.use_bos) == (1, 2, True)


def test_tokenizer_json_comes_before_tokenizer_model(tmp_path: Path) -> None:
    both = dict(tokenizer_model=sentencepiece(), tokenizer_config_json=SPECIAL)
    assert Tokenizer(write(tmp_path / "both", tokenizer_json=byte_level(), **both)).backend == "tokenizers"
    with pytest.raises(InputError, match="damaged cannot be read"):  # and the other one is no way out
        Tokenizer(write(tmp_path / "damaged", tokenizer_json="{]", **both))


DAMAGED = {
    "no tokenizer": (dict(tokenizer_config_json=SPECIAL), "no tokenizer.json"),
    "not json": (dict(tokenizer_json="{]", tokenizer_config_json=SPECIAL), "cannot be read"),
    "cut off": (dict(tokenizer_json='{"version": "1.0", "mod', tokenizer_config_json=SPECIAL), "cannot be read"),
    "not text": (dict(tokenizer_json=b"\xff\xfe\x00", tokenizer_config_json=SPECIAL), "cannot be read"),
    "no sentencepiece": (dict(tokenizer_model=b"nonsense", tokenizer_config_json=SPECIAL), "cannot be read"),
    "empty sentencepiece": (dict(tokenizer_model=b"", tokenizer_config_json=SPECIAL), "cannot be read"),
    "pointer": (
        dict(tokenizer_json="version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json is a Git LFS pointer",
    ),
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
        (SPECIAL, {"eos_token_id": []}, {}, 1, {1}),  # an empty list names none
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
        (
            {},
            {"eos_token_id": -1},
            "the eos_token_id is -1, expected .* of the model's tokens 0 to 299",
        ),
        ({}, {"eos_token_id": [1, -1]}, r"the eos_token_id is \[1, -1\], expected"),
        ({}, {"eos_token_id": True}, "the eos_token_id is True, expected"),
        ({}, {"eos_token_id": "</s>"}, "the eos_token_id is '</s>', expected"),
        ({}, {"eos_token_id": 50256}, "the eos_token_id is 50256, expected"),
        ({}, {"eos_token_id": [None]}, "the eos_token_id is .None., expected"),
        ({"eos_token": 5}, {}, "holds a value that cannot be used"),
        ({"eos_token": {"a": 1}}, {}, "has no 'content'"),
        ({"chat_template": [{"name": "default"}]}, {}, "has no 'template'"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, generation, message, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", tokenizer_json=byte_level(), tokenizer_config_json={"eos_token": "</s>"} | settings)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    where = "x, its tokenizer_config.json or (generation_config|special_tokens_map).json:?"
    with pytest.raises(InputError, match=f"{where} .*{message}"):
        Tokenizer(folder)
