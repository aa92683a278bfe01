"""The rules of the house, read from the sources: `pytest tests/test_house.py`, about 30 s"""

import ast
import dataclasses
import importlib.metadata
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import typing
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from helpers.scripts import SCRIPTS, load

from lit_gpt import InputError
from lit_gpt.cli import dataclasses_of_flags, parse, receiver_of_others

LIBRARY = sorted((ROOT / "lit_gpt").rglob("*.py"))
CODE = LIBRARY + SCRIPTS
EVERYTHING = CODE + sorted((ROOT / "tests").rglob("*.py"))
RECIPES = sorted((ROOT / "finetune/recipes").glob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(path: Path) -> str:
    """lit_gpt/data/prepare.py is lit_gpt.data.prepare, and lit_gpt/data/__init__.py is lit_gpt.data."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


each_file = pytest.mark.parametrize("path", CODE, ids=name)
each_module = pytest.mark.parametrize("path", LIBRARY, ids=name)
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=name)
each_recipe_script = pytest.mark.parametrize("path", sorted((ROOT / "finetune").glob("*.py")), ids=name)


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
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import) and id(node) not in hidden:
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and id(node) not in hidden:
            assert node.level == 0, f"{name(path)} has a relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= (below & MODULES) or {node.module}
    return modules


MODULES = {module(path) for path in LIBRARY}
ARROWS = {module(path): imports(path) & MODULES for path in LIBRARY}


def others(path: Path) -> set[str]:
    """Top-level packages that are neither ours nor Python's."""
    return {m.split(".")[0] for m in imports(path)} - sys.stdlib_module_names - {"lit_gpt"}


def wing(m: str) -> str:
    """The folder of lit_gpt that a module lies in; a file at the root is a wing of its own."""
    return m.split(".")[1] if "." in m else ""


def closure(start: Iterable[str]) -> set[str]:
    """These modules, and all that Python imports with them: a package's __init__ comes with each of its modules."""
    reached: set[str] = set()
    waiting = list(start)
    while waiting:
        m = waiting.pop()
        if m not in reached:
            reached.add(m)
            waiting += ARROWS[m]
            waiting += [package for package in MODULES if m.startswith(f"{package}.")]
    return reached


# Who may know whom, below the scripts: the whole list. A name is a wing or a file at the root, with all that is in it;
# several in one row know the same, and not each other unless it says so. tutorials/architecture.md draws it
MAY_KNOW = {
    "errors packages lock ranges files download name_patterns replace_modules": "errors lock",
    "cli failures interruption out_of_memory": "errors lock files failures out_of_memory",
    "config families": "errors files families",
    "model": "config ranges",
    # no surgeon knows another one
    "lora adapter full quantize cpu_codes": "model errors ranges packages name_patterns replace_modules sharding",
    # it lays linears together, so that it knows those whose codes can be
    "fast_linears": "model cpu_codes replace_modules",
    "display": "errors files packages",
    "scores": "display.words errors files",
    "data": "model.packing config display errors ranges lock files packages out_of_memory",
    "checkpoint": "model lora quantize cpu_codes config families errors lock files download name_patterns out_of_memory"
    " sharding",
    "device nvidia_driver sharding distributed make_optimizer optimizer_in_backward": "device nvidia_driver sharding"
    " make_optimizer watch interruption failures errors packages out_of_memory",
    "watch": "failures",
    "stream_blocks": "model device errors",
    # a chat: what is typed has to be Unicode, and conversations are kept in files; a server ends by a signal
    "generate": "model config data device display.words errors ranges sharding distributed cli files packages"
    " interruption",
    "runs": "scores checkpoint data model lora adapter full quantize cpu_codes fast_linears stream_blocks config device"
    " sharding distributed display cli failures errors lock ranges files packages",
    # no method, no tokenizer, no file format
    "train": "scores evaluation.record_losses data.dataset make_optimizer optimizer_in_backward model.loss"
    " model.packing model.rope stream_blocks device sharding runs.best runs.log runs.resume runs.val_losses"
    " display.words interruption watch failures out_of_memory errors ranges",
    "evaluation": "scores runs generate checkpoint data model lora config device sharding display cli failures ranges"
    " errors files packages lock",
    "harness": "evaluation scores runs generate data model display errors files packages ranges",
    "recipe": "make_optimizer optimizer_in_backward runs data model quantize stream_blocks config device sharding"
    " distributed ranges errors",
    "adapter_recipe": "recipe train evaluation runs generate checkpoint data quantize config device sharding",
    "memory": "train make_optimizer optimizer_in_backward runs checkpoint data model quantize stream_blocks config"
    " device sharding display interruption errors",
    "classifier": "scores recipe train runs checkpoint data model lora quantize config device sharding distributed"
    " display errors ranges files packages",
    "formats": "scores evaluation runs checkpoint data model lora quantize config errors lock files packages",
    # a server is checked against answers, and against models that are rounded in each way
    "studies": "scores evaluation memory runs generate checkpoint data model lora full quantize cpu_codes"
    " config device display cli errors files",
}


def allowed(m: str, wings: str) -> bool:
    """Whether a module is one of these, or lies in one of these wings."""
    names = [f"lit_gpt.{w}" for w in wings.split()]
    assert MODULES.issuperset(names), f"lit_gpt has no {', '.join(sorted(set(names) - MODULES))}"
    return any(f"{m}.".startswith(f"{package}.") for package in names)


@pytest.mark.parametrize("who", MAY_KNOW)
def test_who_may_know_whom(who: str) -> None:
    for row in who.split():
        inside = {m for m in MODULES if allowed(m, row)}
        for m in sorted(inside):
            strangers = {other for other in ARROWS[m] - inside if not allowed(other, MAY_KNOW[who])}
            assert not strangers, f"{m} imports {', '.join(sorted(strangers))}, which is not in the row of {row}."


def test_every_module_has_a_row() -> None:
    rows = set(" ".join(MAY_KNOW).split())
    assert {wing(m) for m in MODULES} - {""} == rows
    assert len(rows) == len(" ".join(MAY_KNOW).split()), "A wing has two rows."


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Names that lead back to the first of them, or an empty list."""
    done: set[str] = set()

    def visit(m: str, way: list[str]) -> list[str]:
        if m in way:
            return [*way[way.index(m) :], m]
        if m in done:
            return []
        for other in sorted(arrows[m] - {m}):
            if back := visit(other, [*way, m]):
                return back
        done.add(m)
        return []

    for m in sorted(arrows):
        if way := visit(m, []):
            return way
    return []


def test_no_circles() -> None:
    """Neither between modules nor between wings. The package's own face, lit_gpt/__init__.py, is above all of them."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle(ARROWS) == []
    wings: dict[str, set[str]] = {}
    for m, known in ARROWS.items():
        if m != "lit_gpt":
            assert "lit_gpt" not in known, f"{m} imports the package's face: import the module that is meant."
            wings.setdefault(wing(m), set()).update(map(wing, known))
    assert circle(wings) == []


def reaches(paths: Iterable[Path], wings: str) -> set[str]:
    """The modules of these wings that Python imports with these files."""
    modules = closure(m for path in paths for m in imports(path) & MODULES)
    return {m for m in modules if allowed(m, wings)}


def test_preparing_data_knows_no_training() -> None:
    prepare = [path for path in SCRIPTS if path.stem.startswith("prepare_")]
    assert len(prepare) > 5 and allowed("lit_gpt.data.prepare", "data")
    assert reaches(prepare, "data.prepare")  # the walk arrives somewhere
    assert reaches(prepare, "train recipe make_optimizer lora adapter full quantize device distributed") == set()
    assert reaches(prepare, "runs memory checkpoint generate classifier formats studies") == set()


def test_fine_tuning_knows_no_classifier_study_or_format() -> None:
    scripts = [ROOT / f"finetune/{method}.py" for method in ("lora", "full", "adapter", "adapter_v2")]
    assert reaches(scripts, "train") == {"lit_gpt.train"}
    assert reaches(scripts, "classifier studies formats") == set()
    runs = [path for path in LIBRARY if wing(module(path)) == "runs"]
    assert runs and reaches(runs, "classifier studies formats memory") == set()


def test_the_loop_knows_no_plan_of_memory() -> None:
    core = [ROOT / "lit_gpt/train.py", ROOT / "lit_gpt/recipe.py"]
    assert reaches(core, "memory classifier studies formats") == set()


def test_torch_stays_out_of_configs() -> None:
    for path in LIBRARY:
        if wing(module(path)) in ("config", "families"):
            assert not others(path), name(path)
    model = [others(path) for path in LIBRARY if wing(module(path)) == "model"]
    assert set().union(*model) == {"torch"}


@each_script
def test_scripts_import_only_the_package_and_what_is_declared(path: Path) -> None:
    ours = {other.stem for other in SCRIPTS} | {"scripts", "finetune", "generate", "tests"}
    assert imports(path, typing_too=True) & MODULES and not {m.split(".")[0] for m in imports(path, True)} & ours


def test_every_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    declared = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}
    distributions = importlib.metadata.packages_distributions()
    # both come with requirements of lightning; see pyproject.toml
    distributions |= {"lightning_fabric": ["lightning"], "lightning_utilities": ["lightning"]}
    # what these are made of, and do not hand on all of
    distributions |= {"starlette": ["fastapi"], "anyio": ["fastapi"], "h11": ["uvicorn"]}
    distributions |= {"lm_eval": ["lm-eval"]}  # which calls itself lm_eval
    distributions |= {"pydantic_core": ["pydantic"], "typing_extensions": ["pydantic"]}
    for path in CODE:
        for package in others(path):
            assert declared & {d.lower() for d in distributions.get(package, [package])}, f"{name(path)}: {package}"


def test_one_home_each() -> None:
    """jsonargparse is cli's, the list of methods that of runs, and one file each knows devices and their processes."""
    assert [name(path) for path in CODE if "jsonargparse" in others(path)] == ["lit_gpt/cli.py"]
    surgeons = {module(path) for path in LIBRARY if wing(module(path)) != "model" and defines(path, "apply_")}
    assert surgeons == {"lit_gpt.lora", "lit_gpt.adapter"}
    assert [m for m in sorted(MODULES) if "lit_gpt.adapter" in ARROWS[m]] == ["lit_gpt.runs.methods"]
    # LoRA alone is known to those who store it as peft does, merge it, or put a head on it, too
    wings = {wing(m) for m in MODULES if "lit_gpt.lora" in ARROWS[m]}
    assert wings == {"checkpoint", "classifier", "formats", "runs", "studies"}
    word = re.compile(r"\b(cuda|mps|ddp|fsdp|nccl|gloo)\b")
    says = {name(path) for path in CODE for text in literals(path) if word.search(text)}
    assert says <= {f"lit_gpt/{file}.py" for file in ("device", "sharding", "distributed")}, says


def defines(path: Path, prefix: str) -> bool:
    """Whether a file has a function at its top level whose name begins so."""
    return any(isinstance(node, ast.FunctionDef) and node.name.startswith(prefix) for node in tree(path).body)


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


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=name)
def test_a_test_file_says_how_to_run_it_and_how_long_that_takes(path: Path) -> None:
    first_line = ast.get_docstring(tree(path)).splitlines()[0]
    assert f"`pytest {name(path)}`, about " in first_line or "`bash scripts/test.sh --gpu`, some minutes" in first_line


@each_module
def test_no_module_only_re_exports(path: Path) -> None:
    """An old path that leads to a new one is a wall between the reader and the code. A package's face is none."""
    work = [node for node in tree(path).body if not isinstance(node, ast.Import | ast.ImportFrom) and not is_text(node)]
    assert work or path.name == "__init__.py", f"{name(path)} defines nothing."


@each_module
def test_a_docstring_stands_without_the_line_above_it(path: Path) -> None:
    """It names its subject: "The dtype of the copy", and not "Of the copy"."""
    texts = [(node.lineno, node.value.value) for node in ast.walk(tree(path)) if is_text(node)]
    assert [f"{name(path)}:{line}: {text[:40]}" for line, text in texts if text.strip().startswith("Of ")] == []


PAGES_ABOUT_CODE = ("architecture", "development", "add_a_model_family")
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_name_what_exists(page: Path) -> None:
    """A path in backquotes, or one that a link leads to, is that of a file, from some folder of the repository on.
    A name in backquotes is one in the code.
    """
    files = [f"/{name(path)}" for path in (*EVERYTHING, *PAGES, *RECIPES)]
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.]+/)*(?!modeling_)\w+\.py)`", text)  # modeling_*.py are transformers'
    assert [file for file in named if not any(path.endswith(f"/{file}") for path in files)] == []
    if page.stem in PAGES_ABOUT_CODE:
        assert set(re.findall(r"`(?:\w+\.)*([A-Za-z]\w*)`", text)) <= words_of_the_code()
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (page.parent / link).exists()]
    assert links == []


@cache
def words_of_the_code() -> set[str]:
    return {word for path in EVERYTHING for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}


@each_file
def test_where_imports_come_from_is_not_ours_to_edit(path: Path) -> None:
    attributes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)]
    asked = {id(node.value) for node in attributes if node.attr == "get"}  # sys.modules.get("torch") edits nothing
    named = {ast.unparse(node) for node in attributes if id(node) not in asked}
    edits = named & {"sys.path", "sys.modules", "sys.meta_path", "site.addsitedir"}
    # the harness' metrics import `evaluate`, and Python would take scripts/evaluate.py for it
    assert edits <= ({"sys.modules"} if name(path) == "lit_gpt/harness/tasks.py" else set())


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


DEFINITIONS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.ClassDef)
DEFINITIONS += (ast.FunctionDef, ast.AsyncFunctionDef)


@each_file
def test_importing_a_file_only_defines(path: Path) -> None:
    for node in tree(path).body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"), f"{name(path)}:{node.lineno}"
        else:
            is_allowed = is_text(node) or isinstance(node, DEFINITIONS) or ast.unparse(node) in ENVIRONMENT
            assert is_allowed, f"{name(path)}:{node.lineno}"


ENVIRONMENT = (
    "choose_how_threads_wait()",
    "os.environ.setdefault('PYTORCH_ALLOC_CONF',"
    " os.environ.get('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True'))",
)
"""What importing the package does, and nothing else: lit_gpt/__init__.py says why."""


@each_script
def test_a_script_imports_the_package_before_torch(path: Path) -> None:
    """OpenMP reads how its threads are to wait when torch is loaded, and never again."""
    packages = []
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            packages += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            packages.append(node.module.split(".")[0])
    assert "torch" not in packages or packages.index("lit_gpt") < packages.index("torch")


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


def test_importing_the_package_changes_three_variables_and_nothing_else(tmp_path: Path) -> None:
    # a subclass of lm-evaluation-harness', imported where a task is asked: it imports requests, which filters warnings
    modules = sorted(MODULES - {"lit_gpt.harness.harness_model"})
    command = [sys.executable, "-c", IMPORTING, *modules]
    users = {"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}
    for variables, changed in (({}, ["environment"]), (users, [])):  # what the user has set stays
        environment = {key: value for key, value in os.environ.items() if key not in users} | variables
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert (json.loads(result.stdout), result.stderr) == (changed, "")


HELP = """
import contextlib, io, json, runpy, sys
heavy, scripts, helps = {"lightning_fabric", "bitsandbytes", "transformers", "matplotlib", "sklearn"}, sys.argv[1:], {}
for script in scripts:
    sys.argv = [script, "--help"]
    text, status = io.StringIO(), None
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    helps[script] = [status, text.getvalue(), sorted(heavy & set(sys.modules))]
print(json.dumps(helps))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory) -> dict[str, tuple]:
    """What --help of every script does, one after the other in one process, in a folder that is not ours."""
    command = [sys.executable, "-c", HELP, *map(str, SCRIPTS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path_factory.mktemp("elsewhere"))
    if result.returncode:
        pytest.fail(result.stderr[-2000:], pytrace=False)
    return json.loads(result.stdout)


def dataclasses_of(main: Callable[..., None]) -> list[type]:
    """The dataclasses that a script's parameters are, be their fields flags of the script or --name.field."""
    return [kind for kind in typing.get_type_hints(main).values() if dataclasses.is_dataclass(kind)]


@each_script
def test_help_from_anywhere_without_heavy_imports(path: Path, helps) -> None:
    status, text, heavy = helps[str(path)]
    assert status == 0 and text.startswith("usage: ") and heavy == []
    main = load(path).main
    assert main.__doc__.split("\n")[0] in " ".join(text.split())
    flat = dataclasses_of_flags(main)
    flags = set(inspect.signature(main).parameters) - {*flat, receiver_of_others(main)}
    flags |= {field.name for kind in flat.values() for field in dataclasses.fields(kind)}
    for flag in flags:
        assert re.search(rf"^  --{flag}\b", text, re.MULTILINE), flag


@each_script
def test_help_has_groups_and_examples(path: Path, helps) -> None:
    """A group for each dataclass of settings, and at the end the commands of the script's docstring."""
    text = helps[str(path)][1]
    lines = text.splitlines()
    main = load(path).main
    headings = [first_words(line) for line in lines if re.match(r"\S", line)]
    for parameter, kind in typing.get_type_hints(main).items():
        if dataclasses.is_dataclass(kind):
            is_flat = parameter in dataclasses_of_flags(main)
            title = kind.__doc__ if is_flat else explained_parameters(main)[parameter]
            assert first_words(title) in headings, f"--help has no group {title!r}"
    commands = [line.strip() for line in ast.get_docstring(tree(path)).splitlines() if f"python {name(path)}" in line]
    assert commands, f"The docstring of {name(path)} has no example."
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert [command for command in commands if f"  {command}" not in examples] == []


def first_words(text: str) -> list[str]:
    return re.findall(r"\w+", text)[:4]


@each_script
def test_documented_commands_are_understood(path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = re.findall(rf"python {name(path)}(.*)", ast.get_docstring(tree(path)).replace("\\\n", " "))
    for command in commands:
        parse(load(path).main, shlex.split(re.split(r" (?:[|>]+) ", command)[0], comments=True))


@cache
def explained_parameters(main: Callable[..., None]) -> dict[str, str]:
    """The parameters that the docstring of `main` explains, and how each explanation begins."""
    return dict(re.findall(r"^        (\w+): (\S.*)", main.__doc__, re.MULTILINE))


def explained_fields(kind: type) -> dict[str, str | None]:
    """The fields of a dataclass, those of its bases included, and the docstring below each."""
    texts = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(inspect.getsource(base)).body
        for node, below in zip(body.body, [*body.body[1:], None]):
            if isinstance(node, ast.AnnAssign):
                texts[node.target.id] = below.value.value if is_text(below) else None
    return texts


@each_script
def test_every_setting_is_explained(path: Path) -> None:
    """Parameters in the docstring of `main`, fields by a docstring of their own; by a sentence, not the rest of one."""
    main = load(path).main
    parameters = explained_parameters(main)
    assert list(parameters) == list(inspect.signature(main).parameters)
    texts = {f"{name(path)} {parameter}": text for parameter, text in parameters.items()}
    for kind in dataclasses_of(main):
        assert kind.__dataclass_params__.frozen
        fields = explained_fields(kind)
        assert list(fields) == [field.name for field in dataclasses.fields(kind)]
        assert [field for field, text in fields.items() if not text] == [], f"{kind.__name__} has bare settings"
        texts |= {f"{kind.__name__}.{field}": text for field, text in fields.items()}
    assert {where: text[:60] for where, text in texts.items() if re.match(r"(Of|What)\b(?!.*\?$)", text)} == {}


def is_text(node: ast.AST | None) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@each_recipe_script
def test_every_parameter_is_saved(path: Path) -> None:
    """`main` puts all its parameters into `settings`, which hyperparameters.yaml keeps; or hands all to a recipe that
    does. A key has the name of its flag: `vars(args)` for flags of their own, `"train": train` for --train.*.
    """
    main = function(path, "main")
    parameters = [argument.arg for argument in main.args.args]
    flat = dataclasses_of_flags(load(path).main)
    settings = settings_of(main)
    if not settings:
        (call,) = [
            node for node in ast.walk(main) if getattr(getattr(node, "func", None), "id", "") == "finetune_adapter"
        ]
        given = {ast.unparse(node) for node in [*call.args, *(keyword.value for keyword in call.keywords)]}
        assert set(parameters) <= given
        recipe = function(ROOT / "lit_gpt/adapter_recipe.py", "finetune_adapter")
        settings = settings_of(recipe).replace("method.flag: method_settings", "'method_settings': method_settings")
        acts = {"method", "show_plan"}  # no flags of a user
        parameters = [argument.arg for argument in recipe.args.args if argument.arg not in acts]
        flat = {"args": Any}
    expected = {p: f"vars({p})" if p in flat else f"'{p}': {p}" for p in parameters}
    assert {p: text for p, text in expected.items() if text not in settings} == {}


def function(path: Path, called: str) -> ast.FunctionDef:
    (node,) = [node for node in tree(path).body if isinstance(node, ast.FunctionDef) and node.name == called]
    return node


def settings_of(node: ast.FunctionDef) -> str:
    """What a function assigns to `settings`, as text."""
    values = []
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if [target for target in targets if getattr(target, "id", "") == "settings"]:
            values.append(ast.unparse(statement.value))
    return " | ".join(values)


def test_no_script_hides_a_package() -> None:
    """The folder of a script is the first place where Python looks for imports."""
    taken = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert {"torch", "lightning_fabric", "json"} <= taken
    hidden = taken & {path.stem for path in SCRIPTS}
    assert hidden <= {"evaluate"}  # which `import_evaluate` of harness/tasks.py finds all the same


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2


def flags(main: Callable[..., None], args: list[str]) -> dict[str, Any]:
    """The settings as the command line has them: fields of `Flags` parameters among the others."""
    settings = parse(main, args)
    for parameter in dataclasses_of_flags(main):
        settings |= vars(settings.pop(parameter))
    return settings


def not_different(settings: dict[str, Any], found: dict[str, Any], default: dict[str, Any]) -> list[str]:
    """The keys of a recipe whose value is the default anyway."""
    same = []
    for key, value in settings.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(found[key]):
            same += not_different(value, vars(found[key]), vars(default[key]) if default[key] else {})
        elif found[key] == default.get(key):
            same.append(f"{key} is {value} anyway")
    return same


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_says_only_what_differs(recipe: Path, tmp_path: Path) -> None:
    """Its first lines say how to run it; every key is a setting of that script, with another value than the default."""
    text = recipe.read_text()
    (script,) = re.findall(rf"^#     python (\S+) --config {name(recipe)}", text, re.MULTILINE)
    main = load(ROOT / script).main
    recipe_settings = yaml.safe_load(text)
    assert not_different(recipe_settings, flags(main, ["--config", str(recipe)]), flags(main, [])) == []
    for more in ("learning_rat: 1", "train:\n  learning_rat: 1"):
        (tmp_path / "wrong.yaml").write_text(more)
        with pytest.raises(InputError, match="learning_rat"):
            parse(main, ["--config", str(tmp_path / "wrong.yaml")])
