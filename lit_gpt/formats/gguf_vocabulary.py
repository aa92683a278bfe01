"""The vocabulary of a GGUF file: a checkpoint's tokenizer in llama.cpp's words.

tokenizer.json, byte-level BPE        ->     model gpt2:  tokens, types, merges, the way to cut words
tokenizer.model, or a tokenizer.json  ->     model llama: tokens, types, scores. llama.cpp joins the two neighbours
that was made of one                         whose union has the highest score
"""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.data.tokenizer_backends import SentencePieceBackend
from lit_gpt.errors import InputError
from lit_gpt.formats.gguf_tokenizer import (
    BYTE,
    NORMAL,
    PRE_TOKENIZERS,
    PROBE,
    UNKNOWN,
    UNUSED,
    added_token_type,
    piece_merges,
    piece_tokenizer,
    pre_tokenizer_of,
)
from lit_gpt.formats.verify import TEXTS

# sentencepiece's tokenizer.model is a protobuf message, see `protobuf_fields`: numbers of its fields, and of theirs
MODEL_PIECES = 1
MODEL_TRAINER = 2
PIECE_TEXT = 1
PIECE_SCORE = 2
PIECE_TYPE = 3
TRAINER_MODEL_TYPE = 3
UNIGRAM, BPE = 1, 2  # values of TRAINER_MODEL_TYPE


class Piece(NamedTuple):
    """A token of sentencepiece."""

    text: str
    type: int
    score: float


def gguf_vocabulary(checkpoint_dir: Path, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's part of a GGUF file: name of a method of gguf.GGUFWriter -> its argument.

    Raises:
        InputError: llama.cpp has no such tokenizer.
    """
    # the tokens
    n_tokens = config.padded_vocab_size
    stored = None
    if tokenizer.backend == "tokenizers":
        stored = json.loads(tokenizer.processor.to_str())  # with the tokens that stand beside tokenizer.json
    if stored is None or is_piece_model(stored["model"]):
        values = piece_vocabulary(checkpoint_dir, stored, n_tokens, tokenizer)
    else:
        values = byte_level_vocabulary(checkpoint_dir, stored, n_tokens, tokenizer)

    # the special ones
    values |= {"add_eos_token_id": tokenizer.eos_id, "add_add_bos_token": tokenizer.use_bos}
    other_stops = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    if len(other_stops) > 2:
        stops = [tokenizer.eos_id, *other_stops]
        raise InputError(
            f"{checkpoint_dir} has {len(stops)} stop tokens, {stops}, a GGUF file at most 3."
            " Leave out some in its generation_config.json."
        )
    for method, token_id in zip(("add_eot_token_id", "add_eom_token_id"), other_stops, strict=False):
        values[method] = token_id
    if tokenizer.bos_id is not None:
        values["add_bos_token_id"] = tokenizer.bos_id
    if list(tokenizer.chat_templates) == ["default"]:
        values["add_chat_template"] = tokenizer.chat_template
    elif tokenizer.chat_templates:
        named = tokenizer.chat_templates.items()
        values["add_chat_template"] = [{"name": name, "template": template} for name, template in named]
    return values


def is_piece_model(model: dict[str, Any]) -> bool:
    """Whether the model in a tokenizer.json was made of a sentencepiece BPE: only that falls back to bytes."""
    return model.get("type") == "BPE" and model.get("byte_fallback") is True


def byte_level_vocabulary(
    checkpoint_dir: Path, stored: dict[str, Any], n_tokens: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The vocabulary of a byte-level BPE.

    Raises:
        InputError: it is none, or cuts texts into words in a way that llama.cpp has no name for.
    """
    if stored["model"].get("type") != "BPE" or stored.get("normalizer"):
        raise InputError(f"The tokenizer of {checkpoint_dir} is no BPE of bytes, or changes texts before it.")

    # the way to cut words that gives the same ones of a text with all that they differ in
    words = tokenizer.processor.pre_tokenizer.pre_tokenize_str(PROBE)
    same = [name for name in PRE_TOKENIZERS if pre_tokenizer_of(name).pre_tokenize_str(PROBE) == words]
    if not same:
        raise InputError(f"llama.cpp has no known name for how {checkpoint_dir} cuts texts into words.")

    # an entry for every row of the embedding; a token beyond them is none of the model's
    tokens = [f"[PAD{i}]" for i in range(n_tokens)]
    types = [UNUSED] * n_tokens
    for token, token_id in stored["model"]["vocab"].items():
        if token_id < n_tokens:
            tokens[token_id] = token
            types[token_id] = NORMAL
    for added in stored.get("added_tokens", []):
        if added["id"] < n_tokens:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = added_token_type(added["special"])
    return {
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": same[0],
        "add_token_list": tokens,
        "add_token_types": types,
        "add_token_merges": [" ".join(pair) for pair in merges_of(stored)],
    }


def merges_of(stored: dict[str, Any]) -> list[list[str]]:
    """The merges of a tokenizer.json, which older ones keep as "left right" and newer ones as ["left", "right"]."""
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in stored["model"]["merges"]]


def piece_vocabulary(
    checkpoint_dir: Path, stored: dict[str, Any] | None, n_tokens: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The vocabulary of a sentencepiece BPE: from tokenizer.model, or from the tokenizer.json that was made of one.

    Raises:
        InputError: llama.cpp would find other tokens.
    """
    # a piece for every row of the embedding
    if stored is None:
        pieces = pieces_of_model(tokenizer.processor.serialized_model_proto())
        # tokens beside the file may go beyond it, or take the place of an unused piece
        assert isinstance(tokenizer.library, SentencePieceBackend), "the other one has a tokenizer.json"
        for token_id, token in tokenizer.library.by_id.items():
            if token_id not in pieces or pieces[token_id].text != token.content:
                pieces[token_id] = Piece(token.content, added_token_type(token.special), 0.0)
    else:
        pieces = pieces_of_json(stored, tokenizer.unk_id)
    rows = [pieces.get(i, Piece(f"[PAD{i}]", UNUSED, 0.0)) for i in range(n_tokens)]
    tokens = [piece.text for piece in rows]
    types = [piece.type for piece in rows]
    scores = [piece.score for piece in rows]

    # does a tokenizer that works as llama.cpp does find the same tokens?
    texts = [PROBE, *TEXTS]
    expected = [encoding.ids for encoding in tokenizer.encode_batch(texts, bos=False)]
    first_id = tokenizer.encode_batch(["a"], bos=False)[0].ids[0]
    adds_space = tokenizer.id_to_token(first_id).startswith("▁")
    unknown = None if tokenizer.unk_id is None else tokens[tokenizer.unk_id]
    rebuilt = piece_tokenizer(tokens, types, scores, unknown, adds_space)
    encodings = rebuilt.encode_batch(texts, add_special_tokens=False)
    if types.count(BYTE) != 256 or [encoding.ids for encoding in encodings] != expected:
        raise InputError(
            f"llama.cpp would find other tokens than the tokenizer of {checkpoint_dir}: it knows byte-level BPE, and "
            "sentencepiece's with 256 bytes and without normalization."
        )

    values = {
        "add_tokenizer_model": "llama",
        "add_tokenizer_pre": "default",
        "add_token_list": tokens,
        "add_token_types": types,
        "add_token_scores": scores,
        "add_add_space_prefix": adds_space,
    }
    if tokenizer.unk_id is not None:
        values["add_unk_token_id"] = tokenizer.unk_id
    return values


def pieces_of_json(stored: dict[str, Any], unknown: int | None) -> dict[int, Piece]:
    """The pieces of a tokenizer.json by id, with scores from the order of its merges: an earlier one is higher.

    Empty if a possible pair is missing from the merges, because llama.cpp would merge it.
    """
    merges = merges_of(stored)
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        scores.setdefault("".join(pair), float(-rank))
    lowest = float(-len(merges))

    # pieces, added tokens, the unknown one
    pieces = {}
    for token, token_id in stored["model"]["vocab"].items():
        piece_type = BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
        pieces[token_id] = Piece(token, piece_type, scores.get(token, lowest))
    for added in stored.get("added_tokens", []):
        pieces[added["id"]] = Piece(added["content"], added_token_type(added["special"]), 0.0)
    if unknown is not None:
        pieces[unknown] = Piece(pieces[unknown].text, UNKNOWN, 0.0)

    # the unions that llama.cpp would make of these scores, and those of the merges
    tokens, types, all_scores = zip(*pieces.values(), strict=True)
    possible = ["".join(pair) for pair in piece_merges(tokens, types, all_scores)]
    normal = {piece.text for piece in pieces.values() if piece.type == NORMAL}
    unions = ["".join(pair) for pair in merges]
    return pieces if possible == [union for union in unions if union in normal] else {}


def pieces_of_model(model: bytes) -> dict[int, Piece]:
    """The pieces of a tokenizer.model by id; empty if it is no BPE but a unigram model.

    The file is read here because the sentencepiece package tells neither which pieces are USER_DEFINED nor whether the
    model is BPE, and its protobuf classes need the package protobuf.
    """
    pieces = []
    trainer: dict[int, Any] = {}
    for number, value in protobuf_fields(model):
        if number == MODEL_PIECES:
            pieces.append(dict(protobuf_fields(value)))
        elif number == MODEL_TRAINER:
            trainer = dict(protobuf_fields(value))
    if trainer.get(TRAINER_MODEL_TYPE, UNIGRAM) != BPE:
        return {}

    result = {}
    for token_id, fields in enumerate(pieces):
        (score,) = struct.unpack("<f", fields.get(PIECE_SCORE, bytes(4)))  # a field that is 0 may be left out
        result[token_id] = Piece(fields[PIECE_TEXT].decode(), fields.get(PIECE_TYPE, NORMAL), score)
    return result


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of each field of a protobuf message; a value that is no integer is bytes.

        field:       key, value         key: a varint, 8 times the field's number plus its wire type
        wire type:   0 a varint     1 eight bytes     2 a varint, then so many bytes (text, a message)     5 four bytes
        varint:      7 bits in each byte, the lowest first; the eighth says that another byte follows: 300 is AC 02

    https://protobuf.dev/programming-guides/encoding/
    """
    at = 0
    while at < len(message):
        key, at = read_varint(message, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = read_varint(message, at)
        else:
            if wire_type == 2:
                size, at = read_varint(message, at)
            else:
                size = {1: 8, 5: 4}[wire_type]
            value = message[at : at + size]
            at += size
        yield key >> 3, value


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a position, and the position after it."""
    number = 0
    shift = 0
    while True:
        byte = content[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, at
