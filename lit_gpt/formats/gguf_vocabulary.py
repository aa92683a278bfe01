"""TODO doc of formats.gguf_vocabulary"""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.formats.gguf_tokenizer import (
    ADDED,
    BYTE,
    NORMAL,
    PRE_TOKENIZERS,
    PROBE,
    UNKNOWN,
    UNUSED,
    piece_merges,
    piece_tokenizer,
    words_of,
)
from lit_gpt.formats.verify import TEXTS


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
