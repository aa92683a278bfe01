"""Tokenizers of GGUF files: made from what a file says, and said as llama.cpp wants to hear it.

llama.cpp runs two sorts of BPE that tokenizer.json repeats exactly: that of bytes, whose words a regular expression
cuts (`gpt2`), and sentencepiece's, which knows no words (`llama`)."""

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from lit_gpt.errors import InputError

TOKENIZER_KEYS = {  # by `tokenizer.ggml.model`: byte-level BPE, and that of sentencepiece
    "gpt2": ("pre", "tokens", "token_type", "merges"),
    "llama": ("tokens", "token_type", "scores"),
}
# What cuts a text into words, per `tokenizer.ggml.pre`: each expression works on the pieces that the one before has
# left. They are llama.cpp's, which normalizes nothing. Its Unicode is a little older than that of `tokenizers`: over
# all of the first three planes, "default" cuts differently at U+1B4E, U+1B4F and U+1B7F, the others nowhere.
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
# Values of `tokenizer.ggml.token_type`, and sentencepiece's: UNKNOWN to USER_DEFINED are taken out of a text first
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ADDED = {True: CONTROL, False: USER_DEFINED}  # for an added token: is it special?
PROBE = "Hello  World, it's 12345 o'clock!!\n\n\tÜber 3.14\u00a0日本語 I'LL don't_x\r\n  end  "


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids of the special tokens that the file names: bos, eos, unk, pad, the end of a turn, of a message."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    ids = {name: id for name, id in ids.items() if id is not None}
    n_tokens = len(metadata["tokenizer.ggml.tokens"])
    outside = ", ".join(f"{name} = {id}" for name, id in ids.items() if id >= n_tokens)
    if outside or "eos" not in ids:
        raise InputError(
            f"The GGUF file has {n_tokens} tokens and the special ones {outside or ids}; expected an eos token, and "
            "ids below the number of tokens. Use the model's Hugging Face folder instead."
        )
    return ids


def adds_bos(metadata: dict[str, Any], special: dict[str, int]) -> bool:
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise InputError(
            "The GGUF file ends every text with an eos token. Use the model's Hugging Face folder instead."
        )
    usual = metadata["tokenizer.ggml.model"] == "llama" or metadata["tokenizer.ggml.pre"] in ADDS_BOS
    adds = metadata.get("tokenizer.ggml.add_bos_token", usual)
    if adds and "bos" not in special:
        raise InputError("The GGUF file begins every text with a bos token, but has no tokenizer.ggml.bos_token_id.")
    return adds


def words_of(kind: str) -> pre_tokenizers.PreTokenizer:
    """What cuts a text into words, and these into the letters that stand for bytes."""
    cuts = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in PRE_TOKENIZERS[kind]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, to_bytes])


def piece_merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """sentencepiece joins the two neighbours whose union has the highest score: every way to a piece is a merge."""
    known = set(tokens)
    pieces = sorted(zip(scores, tokens, types, strict=True), key=lambda piece: -piece[0])
    ways = ((p[:i], p[i:]) for _, p, kind in pieces if kind == NORMAL for i in range(1, len(p)))
    return [(left, right) for left, right in ways if left in known and right in known]


def piece_tokenizer(
    tokens: list[str], types: list[int], scores: list[float], unknown: str | None, prefix: bool
) -> HFTokenizer:
    """A sentencepiece BPE model with bytes for unknown characters, as llama.cpp runs it; `prefix` puts ▁ first."""
    vocab, merges = {token: id for id, token in enumerate(tokens)}, piece_merges(tokens, types, scores)
    tokenizer = HFTokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def byte_level_tokenizer(metadata: dict[str, Any], tokens: list[str]) -> HFTokenizer:
    kind = metadata["tokenizer.ggml.pre"]
    if kind not in PRE_TOKENIZERS:
        raise InputError(
            f"The GGUF file cuts texts into words in the way {kind} (tokenizer.ggml.pre); known are "
            f"{', '.join(PRE_TOKENIZERS)}. Add it to PRE_TOKENIZERS in lit_gpt/gguf_tokenizer.py."
        )
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    strange = [pair for pair in merges if len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}]
    if strange:
        raise InputError(f"The GGUF file has {len(strange)} merges of unknown tokens. Fetch the file again.")
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=kind in IGNORES_MERGES))
    tokenizer.pre_tokenizer = words_of(kind)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_tokenizer(metadata: dict[str, Any], special: dict[str, int]) -> HFTokenizer:
    """tokenizer.json. Its tokens are compared with llama.cpp's in `tests/test_gguf.py`."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata.get("tokenizer.ggml.scores", tokens)
    if not len(set(tokens)) == len(tokens) == len(types) == len(scores):
        raise InputError(
            f"The GGUF file's tokenizer has {len(tokens)} tokens, of which {len(set(tokens))} differ, {len(types)} "
            f"types and {len(scores)} scores; expected equal numbers. Fetch the file again."
        )
    if metadata["tokenizer.ggml.model"] == "llama":
        unknown = tokens[special["unk"]] if "unk" in special else None
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        tokenizer = piece_tokenizer(tokens, types, scores, unknown, prefix)
    else:
        tokenizer = byte_level_tokenizer(metadata, tokens)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type != USER_DEFINED, normalized=False)
            for token, type in zip(tokens, types, strict=True)
            if type in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    if adds_bos(metadata, special):
        bos = tokens[special["bos"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, special["bos"])]
        )
    return tokenizer
