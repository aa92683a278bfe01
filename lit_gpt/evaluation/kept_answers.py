"""Answers that an interrupted evaluation need not ask for again: a file to which each is added as it comes.

    {"key": "9c1f...", "answer": [-3.25, true]}         a line for each; the key is a hash of the model and the question

The model is known by what it says and not by its name or its file, so that an adapter of another scale, another
quantization or another precision is another model. A process that is killed leaves at most half a line, which the next
one cuts off.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from lit_gpt.evaluation.record_losses import eval_mode
from lit_gpt.model.gpt import GPT

N_PROBED = 64
"""Tokens of the text by which a model is known."""


class KeptAnswers:
    """The answers in a file, and those that come."""

    def __init__(self, path: Path | None) -> None:
        """Reads what is there. With None, and until the first answer comes, there is no file."""
        self.path = path
        self.file: BinaryIO | None = None
        self.answers: dict[str, Any] = {}
        if path is not None and path.is_file():
            content = path.read_bytes()
            n_whole = content.rfind(b"\n") + 1
            for line in content[:n_whole].splitlines():
                answer = read_line(line)
                if answer is not None:
                    self.answers[answer["key"]] = answer["answer"]
            if n_whole < len(content):
                with path.open("r+b") as file:
                    file.truncate(n_whole)

    def __len__(self) -> int:
        return len(self.answers)

    def __contains__(self, key: str) -> bool:
        return key in self.answers

    def __getitem__(self, key: str) -> Any:
        return self.answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keeps answers by their keys. They are with the operating system when this returns."""
        self.answers |= answers
        if self.path is None:
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("ab")
        lines = [json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items()]
        self.file.write("".join(lines).encode())
        self.file.flush()

    def __enter__(self) -> "KeptAnswers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def read_line(line: bytes) -> dict[str, Any] | None:
    """What a line says; None for one that is damaged, whose question is asked again."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and answer.keys() >= {"key", "answer"} else None


def key_of(model: str, question: Any) -> str:
    """The key of the answer of a model, given by its `probe_fingerprint`, to a question, which JSON can hold."""
    return hashlib.sha256(json.dumps([model, question]).encode()).hexdigest()[:32]


def probe_fingerprint(model: GPT) -> str:
    """A sha256 over how much text a model reads, and what it says about a fixed one, bit by bit.

    On a CPU another number of threads may round otherwise, so that it counts as another model.
    """
    n = min(N_PROBED, model.config.block_size)
    step = max(1, model.config.vocab_size // n)
    device = next(model.parameters()).device
    idx = torch.arange(n, device=device) * step % model.config.vocab_size
    with eval_mode(model), torch.inference_mode():
        logits = model(idx[None])
    said = logits.float().cpu().numpy().tobytes()
    return hashlib.sha256(str(model.config.block_size).encode() + said).hexdigest()
