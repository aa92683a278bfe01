"""Tables in Markdown, which a terminal shows as they are.

| name | loss |
|---|---:|
| LoRA | 1.25 |
"""

from collections.abc import Sequence


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table without a line end after its last row. Columns whose numbers are in `right` are aligned to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(heads))]
    lines = [markdown_row(heads), f"|{'|'.join(rule)}|"]
    for row in rows:
        lines.append(markdown_row(row))
    return "\n".join(lines)


def markdown_row(cells: Sequence[str]) -> str:
    spaced = [f" {cell} " if cell else " " for cell in cells]  # one space is enough where there is nothing
    return f"|{'|'.join(spaced)}|"
