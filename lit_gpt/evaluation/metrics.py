"""Metrics: from a record and a model's answer to a number, higher is better.

    exact_match      1 if the answer is the expected one, but for space
    contains         1 if the expected answer stands in it as whole words, in any case
    number_match     1 if the last number in it is the last one in the expected answer
    rouge_l          how much of the expected answer's words it has, in their order

Any function of a file of your own is one, too: `--metric my_file.py:judge` with

    def judge(record: dict, answer: str) -> float:          # record["prompt"], record["expected"], and its other keys
        return float(answer.strip().endswith("."))
"""

import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.files import not_there

EXPECTED = "expected"
"""The key of the answer that a record expects."""
PROMPT = "prompt"
NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:\d+(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")  # in 12-7 the second one is 7
CLOSE = 1e-6  # numbers are the same if they differ by no more, relative to the larger one


@dataclass(frozen=True)
class Metric:
    """A way to judge answers."""

    name: str
    """For people: a column of tables."""
    function: Callable[[Mapping[str, Any], str], Any]

    def judge(self, record: Mapping[str, Any], answer: str, where: str) -> float:
        """The number for an answer to a record, which is called `where` in errors.

        Raises:
            InputError: the function gives no number.
        """
        value = self.function(record, answer)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(
                f"The metric {self.name} gives {value!r} for {where}, expected a number. Mend the function."
            )
        return number


# ---- those that are there


def exact_match(record: Mapping[str, Any], answer: str) -> float:
    """1 if the answer is the expected one, where any space is as good as any other, else 0."""
    return float(answer.split() == record[EXPECTED].split())


def contains(record: Mapping[str, Any], answer: str) -> float:
    """1 if the expected answer stands in the answer, as whole words and in upper or lower case, else 0."""
    wanted = " ".join(record[EXPECTED].casefold().split())
    text = " ".join(answer.casefold().split())
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text) is not None)


def number_match(record: Mapping[str, Any], answer: str) -> float:
    """1 if the last number in the answer is the last one in the expected answer, else 0; commas part thousands.

    So are answers judged that think before they say a result, as in GSM8K (https://arxiv.org/abs/2110.14168).
    """
    wanted = last_number(record[EXPECTED])
    said = last_number(answer)
    if wanted is None or said is None:
        return 0.0
    return float(math.isclose(wanted, said, rel_tol=CLOSE))


def last_number(text: str) -> float | None:
    """The last number in a text."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def rouge_l(record: Mapping[str, Any], answer: str) -> float:
    """ROUGE-L (Lin, 2004): the F1 of the longest common subsequence of words, 0 to 1.

    Words are letters and digits in lower case, without stemming: on English texts it is rouge_score's rougeL.
    """
    wanted = words_of(record[EXPECTED])
    said = words_of(answer)
    common = longest_common_subsequence(wanted, said)
    if not common:
        return 0.0
    precision = common / len(said)
    recall = common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """The length of the longest list of words that both have in their order, not necessarily side by side."""
    # row[j]: that of the words of a so far and the first j of b
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


METRICS = {function.__name__: function for function in (exact_match, contains, number_match, rouge_l)}


# ---- one by its name


def read_metric(text: str) -> Metric:
    """The metric that a flag names: one of METRICS, or a function in a file, as `my_file.py:function`.

    Raises:
        InputError: there is none of this name, no such file, no such function in it, or it does not take two arguments.
    """
    if text in METRICS:
        title = "ROUGE-L" if text == "rouge_l" else text.replace("_", " ")
        return Metric(title, METRICS[text])
    file, _, name = text.rpartition(":")
    if not file.endswith(".py"):
        known = ", ".join(METRICS)
        raise InputError(
            f"There is no metric {text}, expected one of {known}, or a function of yours: my_file.py:judge."
        )
    path = Path(file).expanduser()
    if not path.is_file():
        raise not_there(path, path.parent.glob("*.py"), "Name the file of the metric.")
    function = getattr(load_file(path), name, None)
    if not callable(function):
        raise InputError(f"{path} has no function {name}. Name one that it has: --metric {file}:NAME.")
    try:
        inspect.signature(function).bind({}, "")
    except TypeError:
        raise InputError(
            f"{name} of {path} takes {inspect.signature(function)}, expected two arguments: a record, and an answer."
        ) from None
    return Metric(name.replace("_", " "), function)


def file_of_metric(text: str) -> Path | None:
    """The file that a flag names; None for a metric that is there."""
    return None if text in METRICS else Path(text.rpartition(":")[0]).expanduser()


def load_file(path: Path) -> Any:
    """A Python file as a module. Raises InputError if it is not Python; what fails in it is its author's to mend."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a file whose name ends in .py"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno} is no Python: {error.msg}.") from None
    return module
