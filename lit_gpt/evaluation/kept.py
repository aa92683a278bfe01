"""What an evaluation has found so far, in a file: when it is interrupted, it goes on with what is missing.

{"key": "loss 3f09c1a2b4d5e6f7", "value": [15.0, 12]}          a line of JSON for each result, as soon as it is there
{"key": "answer 3f09c1a2b4d5e6f7", "value": "Ada."}
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

from lit_gpt.errors import InputError


class Kept:
    """Results by their keys, each of which is in the file before the next one is found."""

    def __init__(self, path: Path | None) -> None:
        """Reads what is there; the last line of a process that was killed may be torn. With None nothing is written.

        Raises:
            InputError: something else is in the file.
        """
        self.path = path
        self.values: dict[str, Any] = {}
        self.file: BinaryIO | None = None
        self.n_bytes = 0  # of whole lines
        lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self.values[entry["key"]] = entry["value"]
            except (ValueError, TypeError, KeyError):
                raise InputError(
                    f"{path}, line {number} is damaged: no result of this evaluation. Begin anew: --overwrite true."
                ) from None
            self.n_bytes += len(line)

    def __len__(self) -> int:
        return len(self.values)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def add(self, key: str, value: Any) -> None:
        """Keeps a result, which is JSON."""
        self.values[key] = value
        if self.path is None:
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("r+b" if self.path.exists() else "wb")
            self.file.truncate(self.n_bytes)
            self.file.seek(self.n_bytes)
        self.file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
