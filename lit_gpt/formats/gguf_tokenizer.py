"""The tokenizer of a GGUF file as a tokenizer.json.

llama.cpp runs two sorts of BPE that tokenizer.json repeats exactly:

    gpt2    byte-level    words, cut out of the text by regular expressions, then merges of bytes in them
    llama   sentencepiece's    merges of the whole text, which knows no words; characters without a token become bytes
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from lit_gpt.errors import InputError

TOKENIZER_KEYS = {  # tokenizer.ggml.model -> the keys that it needs
    "gpt2": ("pre", "tokens", "token_type", "merges"),
    "llama": ("tokens", "token_type", "scores"),
}
# tokenizer.ggml.pre -> the expressions that cut a text into words, each in the pieces that the one before has left.
# They are llama.cpp's, which normalizes nothing. Its Unicode is a little older than that of `tokenizers`: over all of
# the first three planes, "default" cuts differently at U+1B4E, U+1B4F and U+1B7F, the others nowhere.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3_WORDS = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2_WORDS,),
    "llama-bpe": (LLAMA3_WORDS,),
    "qwen2": (LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "smollm": (r"\p{N}", GPT2_WORDS),
}
IGNORES_MERGES = {"llama-bpe"}  # a word that is a token is not taken apart, whatever the merges say
ADDS_BOS = {"llama-bpe"}  # unless the file says otherwise
# values of tokenizer.ggml.token_type, and sentencepiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ADDED_TYPES = (UNKNOWN, CONTROL, USER_DEFINED)  # found in a text before it is cut into words
# a text on which all ways to cut words above differ
PROBE = "Hello  World, it's 12345 o'clock!!\n\n\tÜber 3.14\u00a0日本語 I'LL don't_x\r\n  end  "


def added_token_type(is_special: bool) -> int:
    """The type of a token that tokenizer.json has under added_tokens."""
    return CONTROL if is_special else USER_DEFINED


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids of the special tokens that the file names: bos, eos, unk, pad, the end of a turn, of a message.

    Raises:
        InputError: no eos token, or an id beyond the tokens.
    """
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
    ids = {}
    for name, key in keys.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            ids[name] = token_id

    n_tokens = len(metadata["tokenizer.ggml.tokens"])
    outside = [f"{name} = {token_id}" for name, token_id in ids.items() if token_id >= n_tokens]
    if outside or "eos" not in ids:
        raise InputError(
            f"The GGUF file has {n_tokens} tokens and the special ones {', '.join(outside) or ids}; expected an eos"
            " token, and ids below the number of tokens. Use the model's Hugging Face folder instead."
        )
    return ids


def adds_bos(metadata: dict[str, Any], special: dict[str, int]) -> bool:
    """Whether every text begins with a bos token.

    Raises:
        InputError: there is no such token, or every text also ends with an eos token.
    """
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise InputError(
            "The GGUF file ends every text with an eos token. Use the model's Hugging Face folder instead."
        )
    by_default = metadata["tokenizer.ggml.model"] == "llama" or metadata["tokenizer.ggml.pre"] in ADDS_BOS
    adds = metadata.get("tokenizer.ggml.add_bos_token", by_default)
    if adds and "bos" not in special:
        raise InputError("The GGUF file begins every text with a bos token, but has no tokenizer.ggml.bos_token_id.")
    return adds


def pre_tokenizer_of(name: str) -> pre_tokenizers.PreTokenizer:
    """Cuts a text into words in a way of PRE_TOKENIZERS, and these into the letters that stand for bytes."""
    cuts = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in PRE_TOKENIZERS[name]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, to_bytes])


def piece_merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE, the first ones first.

    sentencepiece joins the two neighbours whose union has the highest score. So every pair of tokens that makes up a
    token is a merge, and its rank is that of the union.
    """
    known = set(tokens)
    by_score = sorted(zip(scores, tokens, types, strict=True), key=lambda piece: -piece[0])
    merges = []
    for _, token, token_type in by_score:
        if token_type != NORMAL:
            continue
        for i in range(1, len(token)):
            left = token[:i]
            right = token[i:]
            if left in known and right in known:
                merges.append((left, right))
    return merges


def piece_tokenizer(
    tokens: list[str], types: list[int], scores: list[float], unknown: str | None, adds_space: bool
) -> HFTokenizer:
    """A sentencepiece BPE with bytes for unknown characters, as llama.cpp runs it.

    `adds_space` says whether a text gets a space in front, so that its first word is like the others.
    """
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = piece_merges(tokens, types, scores)
    tokenizer = HFTokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))

    # spaces are ▁ in its tokens
    to_pieces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    to_text: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space:
        to_pieces.insert(0, normalizers.Prepend("▁"))
        to_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(to_pieces)
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def byte_level_tokenizer(metadata: dict[str, Any], tokens: list[str]) -> HFTokenizer:
    """A byte-level BPE.

    Raises:
        InputError: an unknown way to cut words, or a merge of unknown tokens.
    """
    name = metadata["tokenizer.ggml.pre"]
    if name not in PRE_TOKENIZERS:
        raise InputError(
            f"The GGUF file cuts texts into words in the way {name} (tokenizer.ggml.pre); known are "
            f"{', '.join(PRE_TOKENIZERS)}. Add it to PRE_TOKENIZERS in lit_gpt/formats/gguf_tokenizer.py."
        )
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    unknown = [pair for pair in merges if len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}]
    if unknown:
        raise InputError(f"The GGUF file has {len(unknown)} merges of unknown tokens. Fetch the file again.")
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in IGNORES_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizer_of(name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_tokenizer(metadata: dict[str, Any], special: dict[str, int]) -> HFTokenizer:
    """The tokenizer of the file. Its tokens are compared with llama.cpp's in `tests/test_gguf.py`.

    Raises:
        InputError: tokens, types and scores do not belong together; see also `byte_level_tokenizer` and `adds_bos`.
    """
    # the lists that belong together
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    scores = metadata.get("tokenizer.ggml.scores", tokens)  # only sentencepiece's have some
    if not len(set(tokens)) == len(tokens) == len(types) == len(scores):
        raise InputError(
            f"The GGUF file's tokenizer has {len(tokens)} tokens, of which {len(set(tokens))} differ, {len(types)} "
            f"types and {len(scores)} scores; expected equal numbers. Fetch the file again."
        )

    # the BPE
    if metadata["tokenizer.ggml.model"] == "llama":
        unknown = tokens[special["unk"]] if "unk" in special else None
        adds_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
        tokenizer = piece_tokenizer(tokens, types, scores, unknown, adds_space)
    else:
        tokenizer = byte_level_tokenizer(metadata, tokens)

    # tokens that are found before it
    added = []
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in ADDED_TYPES:
            added.append(AddedToken(token, special=token_type != USER_DEFINED, normalized=False))
    tokenizer.add_tokens(added)

    # the beginning of a text
    if adds_bos(metadata, special):
        bos = tokens[special["bos"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, special["bos"])]
        )
    return tokenizer
