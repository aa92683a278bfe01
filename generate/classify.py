"""Label texts with what finetune/classifier.py has trained.

    python generate/classify.py --finetuned out/classifier --texts mails.csv > labelled.csv
    echo "You have won a prize" | python generate/classify.py --finetuned out/classifier

Writes a line per text, comma-separated: the label, and the probability of each class.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

from lit_gpt.classify import Texts, compute, encode
from lit_gpt.cli import run
from lit_gpt.device import Precision, default_device, inference_dtype
from lit_gpt.finetuned import load_classifier
from lit_gpt.records import csv_records, json_records


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
        texts: A .csv, .json or .jsonl file with a column of texts; of any other file, each line is a text. None reads
            lines from standard input.
        text_key: The column.
        checkpoint_dir: The base, if it is no longer where it was in training.
        batch_size: How many texts at once.
        precision: Of the weights and the arithmetic.
    """
    device = default_device()
    model, tokenizer, trained = load_classifier(checkpoint_dir, finetuned, inference_dtype(precision), device)
    found = [text for text in read_texts(texts, text_key) if text.strip()]
    ids = encode(found, tokenizer, trained.max_seq_length)
    dataset = Texts(ids, [0] * len(ids), np.arange(len(ids)))  # the labels are not known, and not looked at
    probabilities = torch.from_numpy(compute(model.logits, dataset, batch_size)).softmax(1)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["label", *trained.names])
    for row in probabilities:
        writer.writerow([trained.names[row.argmax()], *(f"{p:.4f}" for p in row.tolist())])


def read_texts(path: Path | None, text_key: str) -> list[str]:
    if path is None:
        return sys.stdin.read().splitlines()
    if path.suffix not in (".csv", ".json", ".jsonl"):
        return path.read_text(encoding="utf-8").splitlines()
    return [str(record[text_key]) for record in (csv_records if path.suffix == ".csv" else json_records)(path)]


if __name__ == "__main__":
    run(main)
