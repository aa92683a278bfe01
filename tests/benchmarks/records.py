"""Records to train on, from the docstrings of Python's standard library. The first half of each is its prompt.

short: one docstring, 50 to 250 tokens. chat: the same inside SmolLM2's chat template, whose opening all records share.
long: several docstrings one after the other, 500 to 1,000 tokens.
"""

import ast
import os
import random
import statistics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
OPENING = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"


def docstrings() -> Iterator[str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*stdlib.glob("*.py"), *stdlib.glob("[a-z]*/*.py")]):
        if "site-packages" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                if text := ast.get_docstring(node):
                    yield text


def make_records(checkpoint_dir: Path, kind: str, count: int) -> list[dict]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint_dir / "tokenizer.json"))
    chance = random.Random(1)
    texts = list(dict.fromkeys(docstrings()))
    chance.shuffle(texts)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    before, between, after = (encode(x) for x in (OPENING, "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"))
    records, ids, wanted = [], [], 0
    for text in texts:
        wanted = wanted or (chance.randint(500, 1000) if kind == "long" else 50)
        ids += encode(("\n\n" if ids else "") + text)
        if len(ids) < wanted:
            ids = ids if kind == "long" else []
            continue
        ids = ids[: wanted if kind == "long" else 250]
        half = len(ids) // 2
        if kind == "chat":
            prompt, response = before + ids[:half] + between, ids[half:] + after
        else:
            prompt, response = ids[:half], ids[half:]
        records.append({"ids": prompt + response, "trained": [0] * len(prompt) + [1] * len(response)})
        ids, wanted = [], 0
        if len(records) == count:
            break
    return records


def describe(records: list[dict]) -> str:
    lengths = [len(record["ids"]) for record in records]
    share = sum(sum(record["trained"]) for record in records) / sum(lengths)
    shared = len(os.path.commonprefix([record["ids"] for record in records]))
    return (
        f"{len(records)} records of {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):.0f},"
        f" mean {statistics.mean(lengths):.0f}, {share:.0%} trained;"
        f" the first {shared} are the same in all"
    )
