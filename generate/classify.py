"""Label texts with what finetune/classifier.py has trained.

    python generate/classify.py --finetuned out/classifier --texts mails.csv > labelled.csv
    echo "You have won a prize" | python generate/classify.py --finetuned out/classifier

Writes a heading and a line per text, comma-separated: the label, the probability of each class, and the text itself,
whose line ends and tabs become a space. So `cut -d, -f1` gives the labels, and the lines stay those of the texts; a
blank text gets one of nothing but commas.
"""

import csv
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lit_gpt import InputError
from lit_gpt.classifier.features import compute_probabilities
from lit_gpt.classifier.head import Classifier
from lit_gpt.classifier.load import load_classifier
from lit_gpt.classifier.texts import Texts, is_missing, text_or_number, tokenize_texts
from lit_gpt.cli import run
from lit_gpt.data.embedding_rows import check_texts
from lit_gpt.data.read_files import is_table, open_text, read_records
from lit_gpt.device import Precision, default_device, inference_dtype
from lit_gpt.display.words import counted
from lit_gpt.ranges import check_range


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
        finetuned: The folder that finetune/classifier.py wrote: its out_dir (then its best), or one folder of it.
        texts: A .csv, .tsv, .json, .jsonl or .parquet file with a column of texts; of any other file, each line is a
            text. None reads lines from standard input.
        text_key: The column of the texts.
        checkpoint_dir: The base, if it is no longer where it was in training.
        batch_size: How many texts at once.
        precision: The dtype of the weights and of the arithmetic.
    """
    check_range("--batch_size", batch_size, at_least=1)

    # the texts, and the numbers of those that are not blank: the model sees only these
    all_texts = read_texts(texts, text_key)
    numbers = [i for i, text in enumerate(all_texts) if text.strip()]
    if not numbers:
        raise InputError(f"There is no text in {texts or 'the standard input'}: nothing to label.")

    # the classifier, and the texts as it reads them
    dtype = inference_dtype(precision)
    model, tokenizer, trained = load_classifier(checkpoint_dir, finetuned, dtype, default_device())
    filled_texts = [all_texts[i] for i in numbers]
    ids = tokenize_texts(filled_texts, tokenizer, trained.max_seq_length)
    check_texts(ids, tokenizer, model.gpt.config)
    unknown_labels = [0] * len(ids)  # a record needs one, and nothing reads it here
    dataset = Texts(ids, unknown_labels, np.arange(len(ids)))

    # a line per text, written as soon as its probabilities are there
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["label", *trained.names, "text"])
    blank = [""] * (2 + len(trained.names))
    rows = probabilities_in_order(model, dataset, batch_size, trained.temperature)
    for text in all_texts:
        if not text.strip():
            writer.writerow(blank)
            continue
        row = next(rows)
        label = trained.names[row.argmax()]
        cells = [f"{probability:.4f}" for probability in row.tolist()]
        writer.writerow([label, *cells, " ".join(text.split())])


def probabilities_in_order(
    model: Classifier, dataset: Texts, batch_size: int, temperature: float
) -> Iterator[np.ndarray]:
    """The probabilities (n_classes,) of each text. Every ten seconds a line on stderr says how many are done."""
    said_at = time.monotonic()
    for start in range(0, len(dataset), batch_size):
        numbers = dataset.records[start : start + batch_size]
        yield from compute_probabilities(model, dataset.choose(numbers), batch_size, temperature)
        sys.stdout.flush()
        if time.monotonic() - said_at > 10:
            said_at = time.monotonic()
            print(f"{start + len(numbers):,} of {counted(len(dataset), 'text')}", file=sys.stderr)


def read_texts(path: Path | None, text_key: str) -> list[str]:
    """The texts of a file or of the standard input, blank ones too.

    Raises:
        InputError: not UTF-8, or a record without `text_key`, or with something there that is no text.
    """
    if path is None:
        return read_standard_input()
    if not is_table(path):
        with open_text(path) as file:
            return [line.removesuffix("\n") for line in file]
    texts = []
    for number, record in enumerate(read_records(path), 1):
        if text_key not in record:
            keys = ", ".join(map(str, record)) or "nothing"
            raise InputError(f"{path}, record {number} has no {text_key}; it has {keys}. Name the column: --text_key.")
        text = record[text_key]
        # a null, as in JSON, is a blank text
        texts.append("" if is_missing(text) else text_or_number(text, f"{path}, record {number}: {text_key}"))
    return texts


def read_standard_input() -> list[str]:
    """The lines of the standard input. Raises InputError if it is not UTF-8."""
    # utf-8-sig drops the mark that Windows programs put at the beginning
    file = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig")
    try:
        return [line.removesuffix("\n") for line in file]
    except UnicodeDecodeError as error:
        raise InputError(f"The standard input is not UTF-8 ({error.reason}). Write it as UTF-8.") from None


if __name__ == "__main__":
    run(main)
