"""Metrics: what they count, and functions of one's own: `pytest tests/test_metrics.py`, about 3 s"""

import re
from pathlib import Path

import pytest

from lit_gpt import InputError
from lit_gpt.evaluation.metrics import METRICS, read_metric


@pytest.mark.parametrize(
    "name, expected, answer, value",
    [
        ("exact_match", "Ada  Lovelace\n", " Ada Lovelace", 1),
        ("exact_match", "Ada", "ada", 0),
        ("contains", "Ada", "It was ADA, I think.", 1),
        ("contains", "Ada", "It was Adam.", 0),
        ("contains", "C++", "In C++ of course", 1),
        ("contains", "two\nwords", "all Two  Words here", 1),
        ("number_match", "48 / 2 = 24\n#### 1,024", "So there are 1024.", 1),
        ("number_match", "#### 18", "18 eggs, or 19", 0),
        ("number_match", "$-3.50", "it is -3.5", 1),
        ("number_match", "0.1", "none", 0),
        ("number_match", "no number", "7", 0),
        ("number_match", "12", "The numbers 7, 12", 1),
        ("number_match", "7", "12-7", 1),
        ("rouge_l", "the cat sat on the mat", "The cat lay on a mat.", 2 * (4 / 6) ** 2 / (8 / 6)),
        ("rouge_l", "a b", "c", 0),
        ("rouge_l", "", "", 0),
        ("rouge_l", "Füße", "füße", 1),
    ],
)
def test_what_they_count(name: str, expected: str, answer: str, value: float) -> None:
    assert read_metric(name).judge({"expected": expected}, answer, "a record") == pytest.approx(value)


def test_rouge_is_that_of_the_library() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    texts = ["Return the sum of a and b, or None.", "Returns a+b if both are there; None otherwise", "the sum of b"]
    for expected in texts:
        for answer in texts:
            of_library = scorer.score(expected, answer)["rougeL"].fmeasure
            assert METRICS["rouge_l"]({"expected": expected}, answer) == pytest.approx(of_library)


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def short(record, answer):\n    return len(answer) < len(record['prompt'])\n"
        "def one(record): ...\ndef text(record, answer): return 'good'\n"
    )
    metric = read_metric(f"{file}:short")
    assert metric.name == "short" and metric.judge({"prompt": "Who?"}, "Me", "x") == 1.0
    refused = {
        f"{file}:long": "has no function long",
        f"{file}:one": "takes (record), expected two arguments",
        f"{tmp_path}/other.py:short": "is not there. Did you mean",
        "exact": "There is no metric exact, expected one of exact_match",
    }
    for text, words in refused.items():
        with pytest.raises(InputError, match=re.escape(words)):
            read_metric(text)
    with pytest.raises(InputError, match="gives 'good' for record 3, expected a number"):
        read_metric(f"{file}:text").judge({}, "", "record 3")
    file.write_text("def short(:\n")
    with pytest.raises(InputError, match=r"mine.py, line 1 is no Python"):
        read_metric(f"{file}:short")
