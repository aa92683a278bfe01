"""Instruction data that is on every machine: what Python's standard library says about itself.

The sources are read with `ast` and nothing is imported. There is one record per documented object, so that no object is
in both splits. Another version of Python gives slightly different records.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# tests, applications, a hundred codecs that say the same, and what has left the library
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "distutils"}
QUESTIONS = (
    "What does the {kind} `{name}` do?",
    "Explain the {kind} `{name}`.",
    "What is the {kind} `{name}` for?",
    "Describe the Python {kind} `{name}`.",
)
TASK = "Write a docstring for this Python {kind}."  # the only one with an input: the `def` line and where it stands
NOISE = re.compile(r"(?i:deprecat|obsolete|not implemented|copyright|\bstub\b|internal use|^see )|XXX|TODO|Internal")
# signatures, doctests, tables, lists, the line before a list, and a heading that runs into the text below it
NOT_PROSE = re.compile(r"->|>>>|\.\.\.|\w  +\w|^\s|^[-*:@]|:$|\A[\w.]+\(|^.{1,45}[\w)]\n[A-Z][a-z]", re.MULTILINE)


class Documented(NamedTuple):
    """A public module, class, function, method or property."""

    kind: str
    name: str
    """The qualified name, such as textwrap.dedent."""
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    above: str
    """The lines that show where it stands: its module, and the classes around it."""


def records() -> Iterator[dict]:
    """One record per public object of the standard library whose docstring opens with a paragraph worth learning."""
    seen = set()
    for item in documented():
        output = first_paragraph(ast.get_docstring(item.node) or "")
        if not output or item.name in seen or output in seen:
            continue
        seen.add(item.name)
        seen.add(output)

        # a hash of the name decides, so another set of questions leaves the split as it is. hash() differs by run
        number = int(hashlib.sha256(item.name.encode()).hexdigest(), 16)
        split = "val" if number % 20 == 0 else "train"
        questions = QUESTIONS
        if item.kind in ("function", "method"):
            questions += (TASK,)
        question = questions[number // 20 % len(questions)]
        source = item.above + signature_of(item.node) if question == TASK else ""  # type: ignore[arg-type] # a function
        yield {
            "instruction": question.format(kind=item.kind, name=item.name),
            "input": source,
            "output": output,
            "split": split,
        }


def signature_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The `def` line of a function."""
    node.body = []
    node.decorator_list = []
    return ast.unparse(node)


def documented() -> Iterator[Documented]:
    """All that is public in the modules of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        # site-packages and its like are no identifiers
        is_public = all(part.isidentifier() and part[0] != "_" for part in parts)
        if is_public and SKIPPED.isdisjoint(parts):
            name = ".".join(parts)
            tree = ast.parse(path.read_bytes())
            yield Documented("module", name, tree, above="")
            yield from definitions(tree, name, above=f"# module {name}\n")


def definitions(parent: ast.Module | ast.ClassDef, name: str, above: str) -> Iterator[Documented]:
    """All that is public in a module or class, whose qualified name is `name`."""
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        full_name = f"{name}.{node.name}"
        if isinstance(node, ast.ClassDef):
            kind = "class"
            yield from definitions(node, full_name, f"{above}class {node.name}:\n    ")
        elif any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
            kind = "property"
        else:
            kind = "method" if isinstance(parent, ast.ClassDef) else "function"
        yield Documented(kind, full_name, node, above)


def first_paragraph(docstring: str) -> str:
    """The first paragraph as one line, or nothing if it is not prose for the users of the library."""
    text = docstring.split("\n\n")[0].strip()
    if not text[:1].isupper() or NOISE.search(text) or NOT_PROSE.search(text):
        return ""
    text = " ".join(text.split())
    if not text.endswith((".", "!", "?")):
        text += "."
    return text if 20 <= len(text) <= 600 else ""
