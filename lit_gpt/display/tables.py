"""Tables in Markdown, which a terminal shows as they are.

| name | loss |
|---|---:|
| LoRA | 1.25 |
"""

from collections.abc import Sequence


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table without a line end after its last row. Columns whose numbers are in `right` are aligned to the right."""
    rule = ["---"] * len(heads)
    for column in right:
        rule[column] += ":"
    lines = [markdown_row(heads)]
    lines.append(f"|{'|'.join(rule)}|")
    for row in rows:
        lines.append(markdown_row(row))
    return "\n".join(lines)


def markdown_row(cells: Sequence[str]) -> str:
    # one space is enough where there is nothing
    spaced = [f" {cell} " if cell else " " for cell in cells]
    return f"|{'|'.join(spaced)}|"
