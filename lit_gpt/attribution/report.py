"""The report of an attribution, for people and for programs.

report.md      the records that lowered the loss the most, and those that raised it, with their texts; and pairs
report.json    the same
scores.csv     a line for each training record
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.attribution.influence import Pair
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.display.tables import markdown_table
from lit_gpt.display.words import counted, shortened
from lit_gpt.files import write_whole
from lit_gpt.generate.answers import bare_question
from lit_gpt.runs.report import code_block, escape_markdown

COLUMNS = ("record", "influence", "loss", "misfit", "targets", "prompt", "answer")
TEXT_LENGTH = 100  # of a prompt or an answer in a table


@dataclass(frozen=True)
class Attribution:
    """What was found for one target."""

    target: str
    """What the loss is of."""
    loss: float
    """In nats per token."""
    influence: np.ndarray
    """(n,): by how much it would be higher without each training record, in nats per token, as an estimate."""
    losses: np.ndarray
    """(n,): the loss of each record, in nats per token."""
    misfit: np.ndarray | None
    """(n,): the loss of each answer as a share of its loss behind other questions. None where it was not asked for."""
    pairs: Sequence[Pair]
    """Records whose gradients point the same way."""


class RecordTexts:
    """Training records for people."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer) -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer

    def __getitem__(self, i: int) -> tuple[str, str]:
        """The prompt without what the style puts around it, and the answer."""
        prompt, answer = self.dataset.question(i)
        return bare_question(prompt, self.tokenizer, self.dataset), self.tokenizer.decode(answer).strip()


def write_attribution(
    out_dir: Path, found: Attribution, dataset: Dataset, tokenizer: Tokenizer, command: str, n_shown: int
) -> str:
    """Writes all files, and returns what the report says, in Markdown."""
    texts = RecordTexts(dataset, tokenizer)
    order = np.argsort(-found.influence, kind="stable").tolist()
    helpful = [i for i in order[:n_shown] if found.influence[i] > 0]
    harmful = [i for i in order[: -n_shown - 1 : -1] if found.influence[i] < 0]

    def table(numbers: Sequence[int], scores: np.ndarray, name: str, form: str) -> str:
        if not len(numbers):
            return "None."
        rows = []
        for i in numbers:
            prompt, answer = (in_cell(text) for text in texts[i])
            figures = [f"{dataset.records[i]}", f"{scores[i]:{form}}", f"{found.losses[i]:.2f}"]
            rows.append([*figures, prompt, answer])
        return markdown_table(("record", name, "loss", "prompt", "answer"), rows, right=(0, 1, 2))

    sections = [
        f"{found.target}: a loss of {found.loss:.4f} nats per token, by {counted(len(order), 'training record')}.",
        "The influence of a record is by how much that loss would be higher without it, as a linear estimate says: what"
        " counts is the order, not the size.",
        "## They lowered it the most",
        table(helpful, found.influence, "influence", "+.2g"),
        "## They raised it the most",
        table(harmful, found.influence, "influence", "+.2g"),
        "## They do the same",
        pairs_table(found.pairs[:n_shown], dataset, texts),
    ]
    misfits: list[int] = []
    if found.misfit is not None:
        misfits = np.argsort(-found.misfit, kind="stable")[:n_shown].tolist()
        sections += [
            "## Their answers may belong to other questions",
            "The misfit is the loss of an answer behind its own question, as a share of its loss behind others. Near 1"
            " or above, the question says nothing about the answer.",
            table(misfits, found.misfit, "misfit", ".2f"),
        ]
    findings = "\n\n".join(sections)
    report = "\n\n".join(["# Attribution", code_block(command, "sh"), findings]) + "\n"
    write_whole(out_dir / "report.md", report)
    content = as_json(found, dataset, texts, command, helpful, harmful, misfits)
    write_whole(out_dir / "report.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_whole(out_dir / "scores.csv", scores_csv(found, dataset, texts))
    return findings


def in_cell(text: str) -> str:
    """The beginning of a text, for a cell of a table."""
    return escape_markdown(shortened(" ".join(text.split()), TEXT_LENGTH))


def pairs_table(pairs: Sequence[Pair], dataset: Dataset, texts: RecordTexts) -> str:
    """Records whose gradients point the same way: training on both teaches what training on one teaches."""
    if not pairs:
        return "No two records have gradients that point the same way."
    rows = []
    for pair in pairs:
        numbers = f"{dataset.records[pair.first]}, {dataset.records[pair.second]}"
        answers = [in_cell(texts[i][1]) for i in (pair.first, pair.second)]
        rows.append([numbers, f"{pair.cosine:.2f}", *answers])
    return markdown_table(("records", "cosine", "answer", "answer"), rows, right=(1,))


def as_json(
    found: Attribution,
    dataset: Dataset,
    texts: RecordTexts,
    command: str,
    helpful: Sequence[int],
    harmful: Sequence[int],
    misfits: Sequence[int],
) -> dict[str, Any]:
    """The content of report.json."""

    def entry(i: int) -> dict[str, Any]:
        prompt, answer = texts[i]
        return {
            "record": int(dataset.records[i]),
            "influence": float(found.influence[i]),
            "loss": float(found.losses[i]),
            "misfit": None if found.misfit is None else float(found.misfit[i]),
            "prompt": prompt,
            "answer": answer,
        }

    return {
        "command": command,
        "target": found.target,
        "loss": found.loss,
        "lowered": [entry(i) for i in helpful],
        "raised": [entry(i) for i in harmful],
        "misfits": [entry(i) for i in misfits],
        "alike": [
            {
                "records": [int(dataset.records[pair.first]), int(dataset.records[pair.second])],
                "cosine": pair.cosine,
            }
            for pair in found.pairs
        ],
    }


def scores_csv(found: Attribution, dataset: Dataset, texts: RecordTexts) -> str:
    """A line for each training record, in their order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for i, record in enumerate(dataset.records.tolist()):
        misfit = "" if found.misfit is None else f"{found.misfit[i]:.6g}"
        figures = (f"{found.influence[i]:.6g}", f"{found.losses[i]:.6g}", misfit, dataset.n_targets(i))
        writer.writerow((record, *figures, *texts[i]))
    return text.getvalue()
