"""Label texts with what finetune/classifier.py has trained.

    python generate/classify.py --finetuned out/classifier --texts mails.csv > labelled.csv
    echo "You have won a prize" | python generate/classify.py --finetuned out/classifier

Writes a line per text, comma-separated: the label, and the probability of each class; of a blank text only the commas,
so that lines stay beside lines.
"""

import csv
import io
import sys
from pathlib import Path

import numpy as np
import torch

from lit_gpt import InputError
from lit_gpt.classifier.features import compute
from lit_gpt.classifier.load import load_classifier
from lit_gpt.classifier.texts import Texts, encode
from lit_gpt.cli import run
from lit_gpt.data.read_files import open_text, read_records
from lit_gpt.device import Precision, default_device, inference_dtype


def main(
    finetuned: Path,
    texts: Path | None = None,
    text_key: str = "text",
    checkpoint_dir: Path | None = None,
    batch_size: int = 16,
    precision: Precision = "auto",
) -> None:
    """Label texts.

    Args:
        finetuned: What finetune/classifier.py wrote: its out_dir (then its best), or one folder of it.
        texts: A .csv, .json, .jsonl or .parquet file with a column of texts; of any other file, each line is a text.
            None reads lines from standard input.
        text_key: The column.
        checkpoint_dir: The base, if it is no longer where it was in training.
        batch_size: How many texts at once.
        precision: Of the weights and the arithmetic.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size is {batch_size}, expected 1 or more.")
    found = read_texts(texts, text_key)
    filled = [i for i, text in enumerate(found) if text.strip()]
    if not filled:
        raise InputError(f"There is no text in {texts or 'the standard input'}: nothing to label.")
    device = default_device()
    model, tokenizer, trained = load_classifier(checkpoint_dir, finetuned, inference_dtype(precision), device)
    ids = encode([found[i] for i in filled], tokenizer, trained.max_seq_length)
    dataset = Texts(ids, [0] * len(ids), np.arange(len(ids)))  # the labels are not known, and not looked at
    probabilities = torch.from_numpy(compute(model.logits, dataset, batch_size)).softmax(1)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["label", *trained.names])
    lines = [[""] * (1 + len(trained.names)) for _ in found]
    for i, row in zip(filled, probabilities, strict=True):
        lines[i] = [trained.names[row.argmax()], *(f"{p:.4f}" for p in row.tolist())]
    writer.writerows(lines)


def read_texts(path: Path | None, text_key: str) -> list[str]:
    if path is None:
        try:
            return [line.removesuffix("\n") for line in io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig")]
        except UnicodeDecodeError as error:
            raise InputError(f"The standard input is not UTF-8 ({error.reason}). Write it as UTF-8.") from None
    if path.suffix not in (".csv", ".json", ".jsonl", ".parquet"):
        with open_text(path) as file:
            return [line.removesuffix("\n") for line in file]
    texts = []
    for number, record in enumerate(read_records(path), 1):
        if text_key not in record:
            has = ", ".join(map(str, record)) or "nothing"
            raise InputError(f"{path}, record {number} has no {text_key}; it has {has}. Name the column: --text_key.")
        texts.append("" if record[text_key] is None else str(record[text_key]))
    return texts


if __name__ == "__main__":
    run(main)
