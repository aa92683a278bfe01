"""Instruction data that is on every machine: what Python's standard library says about itself.

The sources are read with `ast` and nothing is imported. There is one record per documented object, so that no object is
in both splits. Another version of Python gives slightly different records."""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

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


def records() -> Iterator[dict]:
    """One record per public object of the standard library whose docstring opens with a paragraph worth learning."""
    seen = set()
    for kind, name, node, above in documented():
        output = first_paragraph(ast.get_docstring(node) or "")
        if not output or not seen.isdisjoint((name, output)):
            continue
        seen.update((name, output))

        number = int(hashlib.sha256(name.encode()).hexdigest(), 16)  # hash() differs from run to run
        split, choice = "val" if number % 20 == 0 else "train", number // 20
        questions, source = (*QUESTIONS, TASK) if kind in ("function", "method") else QUESTIONS, ""
        question = questions[choice % len(questions)]
        if question == TASK:
            node.body, node.decorator_list = [], []
            source = above + ast.unparse(node)
        yield {"instruction": question.format(kind=kind, name=name), "input": source, "output": output, "split": split}


def documented() -> Iterator[tuple[str, str, ast.AST, str]]:
    """(kind, qualified name, node, lines above it) of each public module, class, function, method and property."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        # site-packages and its like are no identifiers
        if SKIPPED.isdisjoint(parts) and all(part.isidentifier() and part[0] != "_" for part in parts):
            name, tree = ".".join(parts), ast.parse(path.read_bytes())
            yield "module", name, tree, ""
            yield from definitions(tree, name, f"# module {name}\n")


def definitions(parent: ast.Module | ast.ClassDef, name: str, above: str) -> Iterator[tuple[str, str, ast.AST, str]]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        kind = "method" if isinstance(parent, ast.ClassDef) else "function"
        if isinstance(node, ast.ClassDef):
            kind = "class"
            yield from definitions(node, f"{name}.{node.name}", f"{above}class {node.name}:\n    ")
        elif any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
            kind = "property"
        yield kind, f"{name}.{node.name}", node, above


def first_paragraph(docstring: str) -> str:
    """The first paragraph as one line, or nothing if it is not prose for the users of the library."""
    text = docstring.split("\n\n")[0].strip()
    if not text[:1].isupper() or NOISE.search(text) or NOT_PROSE.search(text):
        return ""
    text = " ".join(text.split())
    text += "" if text.endswith((".", "!", "?")) else "."
    return text if 20 <= len(text) <= 600 else ""
