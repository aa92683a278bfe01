"""The rules of the house, read from the sources: `pytest tests/test_house.py`"""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
import typing
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from conftest import ROOT

from lit_gpt import InputError
from lit_gpt.cli import parse, shared_settings

LIBRARY = sorted((ROOT / "lit_gpt").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("scripts", "finetune", "generate") for path in (ROOT / folder).glob("*.py"))
CODE = LIBRARY + SCRIPTS
EVERYTHING = CODE + sorted((ROOT / "tests").rglob("*.py"))
RECIPES = sorted((ROOT / "finetune/recipes").glob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


each_file = pytest.mark.parametrize("path", CODE, ids=name)
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=name)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, typing_too: bool = False) -> set[str]:
    """The modules that a file imports, wherever in it; what only TYPE_CHECKING sees is left out."""
    hidden = {
        id(node)
        for block in ast.walk(tree(path))
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test) and not typing_too
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import) and id(node) not in hidden:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and id(node) not in hidden:
            assert node.level == 0, f"{name(path)} has a relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & MODULES) or {node.module}
    return found


MODULES = {module(path) for path in LIBRARY}
ARROWS = {source: {m for m in imports(path) if m in MODULES} for source, path in zip(map(module, LIBRARY), LIBRARY)}
SURGEONS = {module(path) for path in LIBRARY for node in tree(path).body if getattr(node, "name", "")[:6] == "apply_"}
SURGEONS.discard("lit_gpt.rope")  # apply_rope


def others(path: Path) -> set[str]:
    """Top-level packages that are neither ours nor Python's."""
    return {m.split(".")[0] for m in imports(path)} - sys.stdlib_module_names - {"lit_gpt"}


# The whole list of what these may know of the rest of the package
MAY_KNOW = {
    "errors": "",
    "layout": "",
    "files": "errors",
    "replace": "errors",
    "config": "errors families",
    "families": "errors",
    "rope": "config",
    "model": "config layout rope",
    "tokenizer": "config errors",
    "prompts": "errors records tokenizer",
    "records": "errors",
    "cli": "errors",
    "device": "errors",
    "quantize": "errors replace",
    "train": "dataset device errors log",  # no method, no tokenizer, no file format
    **{surgeon.removeprefix("lit_gpt."): "errors model replace" for surgeon in sorted(SURGEONS)},
}


@pytest.mark.parametrize("who", MAY_KNOW)
def test_who_may_know_whom(who: str) -> None:
    allowed = {f"lit_gpt.{other}" for other in MAY_KNOW[who].split()}
    inside = {m for m in MODULES if m == f"lit_gpt.{who}" or m.startswith(f"lit_gpt.{who}.")}
    assert inside, f"lit_gpt has no {who}"
    for m in inside:
        assert ARROWS[m] - inside <= allowed, m


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(m: str, way: tuple[str, ...]) -> None:
        assert m not in way, " -> ".join([*way, m])
        if m not in done:
            for other in ARROWS[m] - {m}:
                visit(other, (*way, m))
            done.add(m)

    for m in ARROWS:
        visit(m, ())


def test_torch_stays_out_of_configs() -> None:
    for path in LIBRARY:
        if module(path) == "lit_gpt.config" or module(path).startswith("lit_gpt.families"):
            assert not others(path), name(path)
    (model,) = (path for path in LIBRARY if module(path) == "lit_gpt.model")
    assert others(model) == {"torch"}


@each_script
def test_scripts_import_only_the_package_and_what_is_declared(path: Path) -> None:
    ours = {other.stem for other in SCRIPTS} | {"scripts", "finetune", "generate", "tests"}
    assert imports(path, typing_too=True) & MODULES and not {m.split(".")[0] for m in imports(path, True)} & ours


def test_every_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    declared = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}
    declared.add("pyyaml")  # jsonargparse brings it
    distributions = importlib.metadata.packages_distributions()
    for path in CODE:
        for package in others(path):
            assert declared & {d.lower() for d in distributions.get(package, [package])}, f"{name(path)}: {package}"


def test_one_home_each() -> None:
    """jsonargparse is cli's, the list of methods finetuned's, and only device knows which devices there are."""
    assert [name(path) for path in CODE if "jsonargparse" in others(path)] == ["lit_gpt/cli.py"]
    # peft.py is LoRA in another file format, export.py merges, and xray.py estimates the cost of a step with LoRA
    assert {m for m in MODULES if ARROWS[m] & SURGEONS} == {
        "lit_gpt.finetuned",
        "lit_gpt.peft",
        "lit_gpt.export",
        "lit_gpt.xray",
    }
    assert SURGEONS and "lit_gpt.lora" in SURGEONS
    word = re.compile(r"\b(cuda|mps|ddp|fsdp|nccl|gloo)\b")
    says = {name(path) for path in CODE for text in literals(path) if word.search(text)}
    assert says == {"lit_gpt/device.py"}


def literals(path: Path) -> list[str]:
    """The strings of a file, but not its docstrings."""
    bare = {id(node.value) for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)}
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and id(node) not in bare]
    return [node.value for node in nodes if isinstance(node.value, str)]


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_sources_are_tidy(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree(path)
    assert [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 120] == []
    assert "\t" not in text and "\r" not in text


@each_file
def test_where_imports_come_from_is_not_ours_to_edit(path: Path) -> None:
    named = {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    assert named.isdisjoint({"sys.path", "sys.modules", "sys.meta_path", "site.addsitedir"})


@each_file
def test_nothing_is_unpickled(path: Path) -> None:
    assert others(path).isdisjoint({"dill", "joblib", "cloudpickle"})
    assert imports(path, typing_too=True).isdisjoint({"pickle", "marshal", "shelve"})
    for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if ast.unparse(call.func) == "torch.load":
            assert keywords.get("weights_only") == "True", f"{name(path)}:{call.lineno}"
        assert "allow_pickle" not in keywords, f"{name(path)}:{call.lineno}"
        assert ast.unparse(call.func) not in ("yaml.load", "yaml.unsafe_load", "eval", "exec"), (
            f"{name(path)}:{call.lineno}"
        )


@each_file
def test_importing_a_file_only_defines(path: Path) -> None:
    for node in tree(path).body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"), f"{name(path)}:{node.lineno}"
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{name(path)}:{node.lineno}"
        else:
            plain = (
                ast.Import,
                ast.ImportFrom,
                ast.Assign,
                ast.AnnAssign,
                ast.AugAssign,
                ast.FunctionDef,
                ast.ClassDef,
            )
            assert isinstance(node, plain), f"{name(path)}:{node.lineno}"


IMPORTING = """
import importlib, json, os, signal, sys, threading, warnings
import numpy, torch

def state():
    yield "environment", dict(os.environ)
    yield "torch", [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled()]
    yield "matmul", [torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark]
    yield "random", [torch.initial_seed(), numpy.random.get_state()[1].sum().item()]
    yield "rest", [sys.path, str(warnings.filters), threading.active_count(), os.listdir(), os.getcwd()]
    yield "signals", str([signal.getsignal(number) for number in signal.valid_signals()])
    yield "hooks", str([sys.excepthook, sys.displayhook, print])

before = dict(state())
for name in sys.argv[1:]:
    importlib.import_module(name)
after = dict(state())
print(json.dumps([key for key in before if before[key] != after[key]]))
"""


def test_importing_the_package_changes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTING, *sorted(MODULES)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("[]\n", "")


HELP = """
import contextlib, io, json, runpy, sys
heavy, scripts, found = {"lightning_fabric", "bitsandbytes", "transformers"}, sys.argv[1:], {}
for script in scripts:
    sys.argv = [script, "--help"]
    text, status = io.StringIO(), None
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    found[script] = [status, text.getvalue(), sorted(heavy & set(sys.modules))]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory) -> dict[str, tuple]:
    """What --help of every script does, one after the other in one process, in a folder that is not ours."""
    command = [sys.executable, "-c", HELP, *map(str, SCRIPTS)]
    return json.loads(subprocess.check_output(command, cwd=tmp_path_factory.mktemp("elsewhere")))


@each_script
def test_help_from_anywhere_without_heavy_imports(path: Path, helps) -> None:
    status, text, heavy = helps[str(path)]
    assert status == 0 and text.startswith("usage: ") and heavy == []
    main = load(path).main
    assert main.__doc__.split("\n")[0] in " ".join(text.split())
    flags = {flag for flag in inspect.signature(main).parameters if flag != "shared"}
    flags |= {field.name for kind in shared_settings(main) for field in dataclasses.fields(kind)}
    for flag in flags:
        assert re.search(rf"^  --{flag}\b", text, re.MULTILINE), flag


@each_script
def test_documented_commands_are_understood(path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = re.findall(rf"python {name(path)}(.*)", ast.get_docstring(tree(path)).replace("\\\n", " "))
    for command in commands:
        parse(load(path).main, shlex.split(re.split(r" (?:[|>]+) ", command)[0], comments=True))


@cache
def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@each_script
def test_every_setting_is_explained(path: Path) -> None:
    """Parameters in the docstring of `main`, fields by a docstring of their own."""
    main = load(path).main
    explained = re.findall(r"^        (\w+): \S", main.__doc__, re.MULTILINE)
    assert explained == list(inspect.signature(main).parameters)
    for kind in (*shared_settings(main), *typing.get_type_hints(main).values()):
        if dataclasses.is_dataclass(kind):
            assert kind.__dataclass_params__.frozen
            (body,) = ast.parse(inspect.getsource(kind)).body
            following = zip(body.body, [*body.body[1:], None])
            bare = [a.target.id for a, b in following if isinstance(a, ast.AnnAssign) and not is_docstring(b)]
            assert bare == [], f"{kind.__name__} has settings without a docstring"


def is_docstring(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_no_script_hides_a_package() -> None:
    """The folder of a script is the first place where Python looks for imports."""
    taken = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert {"torch", "lightning_fabric", "json"} <= taken
    assert taken.isdisjoint(path.stem for path in SCRIPTS)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_says_only_what_differs(recipe: Path, tmp_path: Path) -> None:
    """Its first lines say how to run it; every key is a setting of that script, with another value than the default."""
    text = recipe.read_text()
    (script,) = re.findall(rf"^#     python (\S+) --config {name(recipe)}", text, re.MULTILINE)
    main, settings = load(ROOT / script).main, yaml.safe_load(text)
    found, default = parse(main, ["--config", str(recipe)]), parse(main, [])

    def compare(settings: dict, found, default) -> None:
        for key, value in settings.items():
            ours, theirs = (vars(of).get(key) if dataclasses.is_dataclass(of) else of[key] for of in (found, default))
            if isinstance(value, dict):
                compare(value, ours, theirs)
            else:
                assert ours != theirs, f"{key} is {value} anyway"

    compare(settings, found, default)
    for more in ("learning_rat: 1", "train:\n  learning_rat: 1"):
        (tmp_path / "wrong.yaml").write_text(more)
        with pytest.raises(InputError, match="learning_rat"):
            parse(main, ["--config", str(tmp_path / "wrong.yaml")])
