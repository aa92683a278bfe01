"""Tokenizers of GGUF files: made from what a file says, and said as llama.cpp wants to hear it.

llama.cpp runs two sorts of BPE that tokenizer.json repeats exactly: that of bytes, whose words a regular expression
cuts (`gpt2`), and sentencepiece's, which knows no words (`llama`).
"""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from lit_gpt.config import Config
from lit_gpt.errors import InputError
from lit_gpt.proof import TEXTS
from lit_gpt.tokenizer import Tokenizer

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


def vocabulary(checkpoint_dir: Path, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What llama.cpp needs to know of the tokenizer, by the writer's method for it."""
    path = checkpoint_dir / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if tokenizer.backend == "tokenizers" else None
    if stored is None or (stored["model"].get("type"), stored["model"].get("byte_fallback")) == ("BPE", True):
        found = pieces(checkpoint_dir, stored, config.padded_vocab_size, tokenizer)
    else:
        found = byte_level(checkpoint_dir, stored, config.padded_vocab_size, tokenizer)
    found |= {"add_eos_token_id": tokenizer.eos_id, "add_add_bos_token": tokenizer.use_bos}
    others = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    if len(others) > 2:
        raise InputError(
            f"{checkpoint_dir} has {len(others) + 1} stop tokens, {[tokenizer.eos_id, *others]}, a GGUF file at most 3."
            " Leave out some in its generation_config.json."
        )
    found |= {name: i for name, i in zip(("add_eot_token_id", "add_eom_token_id"), others)}
    if tokenizer.bos_id is not None:
        found["add_bos_token_id"] = tokenizer.bos_id
    if tokenizer.chat_template:
        found["add_chat_template"] = tokenizer.chat_template
    return found


def byte_level(checkpoint_dir: Path, stored: dict[str, Any], size: int, tokenizer: Tokenizer) -> dict[str, Any]:
    if stored["model"].get("type") != "BPE" or stored.get("normalizer"):
        raise InputError(f"The tokenizer of {checkpoint_dir} is no BPE of bytes, or changes texts before it.")
    own = tokenizer.processor.pre_tokenizer.pre_tokenize_str(PROBE)
    kinds = [kind for kind in PRE_TOKENIZERS if words_of(kind).pre_tokenize_str(PROBE) == own]
    if not kinds:
        raise InputError(f"llama.cpp has no known name for how {checkpoint_dir} cuts texts into words.")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * len(tokens)
    for token, i in stored["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in stored.get("added_tokens", []):
        tokens[added["id"]], types[added["id"]] = added["content"], ADDED[added["special"]]
    return {
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": kinds[0],
        "add_token_list": tokens,
        "add_token_types": types,
        "add_token_merges": [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]],
    }


def pieces(checkpoint_dir: Path, stored: dict[str, Any] | None, size: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Of sentencepiece's BPE: from tokenizer.model, or from the tokenizer.json that was made of one."""
    if stored is None:
        found = pieces_of_model(tokenizer.processor.serialized_model_proto())
    else:
        found = pieces_of_json(stored, tokenizer.unk_id)
    rows = (found.get(i, (f"[PAD{i}]", UNUSED, 0.0)) for i in range(size))
    tokens, types, scores = map(list, zip(*rows))
    texts = [PROBE, *TEXTS]
    own = [encoded.ids for encoded in tokenizer.encode_batch(texts, bos=False)]
    prefix = tokenizer.id_to_token(tokenizer.encode_batch(["a"], bos=False)[0].ids[0]).startswith("▁")
    unknown = None if tokenizer.unk_id is None else tokens[tokenizer.unk_id]
    again = piece_tokenizer(tokens, types, scores, unknown, prefix).encode_batch(texts, add_special_tokens=False)
    if types.count(BYTE) != 256 or [encoding.ids for encoding in again] != own:
        raise InputError(
            f"llama.cpp would find other tokens than the tokenizer of {checkpoint_dir}: it knows byte-level BPE, and "
            "sentencepiece's with 256 bytes and without normalization."
        )
    kept = {
        "add_tokenizer_model": "llama",
        "add_tokenizer_pre": "default",
        "add_token_list": tokens,
        "add_token_types": types,
        "add_token_scores": scores,
        "add_add_space_prefix": prefix,
    }
    return kept if tokenizer.unk_id is None else kept | {"add_unk_token_id": tokenizer.unk_id}


Pieces = dict[int, tuple[str, int, float]]  # by id: how it is spelled, what it is, and its score


def pieces_of_json(stored: dict[str, Any], unknown: int | None) -> Pieces:
    """What is joined earlier has a higher score. Nothing where the merges leave out a way to a piece: llama.cpp would
    go that, too."""
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in stored["model"]["merges"]]
    ranks = {"".join(pair): -rank for rank, pair in reversed([*enumerate(pairs)])}
    found = {}
    for token, i in stored["model"]["vocab"].items():
        kind = BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
        found[i] = token, kind, float(ranks.get(token, -len(pairs)))
    for added in stored.get("added_tokens", []):
        found[added["id"]] = added["content"], ADDED[added["special"]], 0.0
    if unknown is not None:
        found[unknown] = found[unknown][0], UNKNOWN, 0.0
    normal = {token for token, kind, _ in found.values() if kind == NORMAL}
    ours = ["".join(pair) for pair in piece_merges(*zip(*found.values()))]
    return found if ours == [joined for joined in map("".join, pairs) if joined in normal] else {}


def pieces_of_model(proto: bytes) -> Pieces:
    """Of sentencepiece's file: its field 1 is a piece each, of text, score and type; 2 is how it was trained.

    The package tells neither which pieces are USER_DEFINED nor whether the model is BPE: the trainer's field 3 is 2.
    Nothing where it is not.
    """
    trainer = dict(fields(next(value for number, value in fields(proto) if number == 2)))
    if trainer.get(3, 1) != 2:
        return {}
    found = [dict(fields(value)) for number, value in fields(proto) if number == 1]
    score = struct.Struct("<f")
    return {
        i: (piece[1].decode(), piece.get(3, NORMAL), score.unpack(piece.get(2, bytes(4)))[0])
        for i, piece in enumerate(found)
    }


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message; what is no integer is bytes."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        if tag & 7 == 0:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = message[at : at + size], at + size
        yield tag >> 3, value


def varint(content: bytes, at: int) -> tuple[int, int]:
    """The number there, of 7 bits in each byte, and where it ends."""
    end = next(i for i in range(at, len(content)) if content[i] < 128) + 1
    return sum((byte & 127) << 7 * i for i, byte in enumerate(content[at:end])), end
