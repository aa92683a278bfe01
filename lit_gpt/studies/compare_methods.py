"""A comparison of fine-tuning methods: runs of the scripts in finetune/ on the same records, side by side.

Every method is trained by its own script in a process of its own, so that its peak memory is its own. All read the same
records in the same order. How much a model forgot is measured on a text that has nothing to do with the data: see
`evaluation/forgetting.py`.

    out_dir/compare.json               the budget: what all runs have in common
    out_dir/adapter/                   a run, with its metrics.csv and best/; last/ is deleted when it is done
    out_dir/adapter/outcome.json       its row of the table; a method that has one is done
    out_dir/compare.md, compare.png    the table and the figure, of all that are done
"""

import gc
import hashlib
import json
import math
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.checkpoint.load import build_model, load_model
from lit_gpt.checkpoint.weight_files import read_tensors
from lit_gpt.cli import parse
from lit_gpt.config import Config
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.display.figures import new_row, require_drawing, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.errors import InputError
from lit_gpt.evaluation.forgetting import RememberedBase, forgetting, general_records, remember_base
from lit_gpt.evaluation.record_losses import Record
from lit_gpt.files import write_whole
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.memory.plan import adapt, setup_of_script
from lit_gpt.runs.header import finetuned_file, read_header
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.log import read_metrics
from lit_gpt.runs.methods import METHODS
from lit_gpt.runs.resume import data_fingerprint
from lit_gpt.runs.val_losses import LAST
from lit_gpt.runs.val_losses import NAME as VAL_LOSSES
from lit_gpt.scores.paired import in_words, paired_difference
from lit_gpt.scores.record_scores import RecordScores, read_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PROBE_STEPS = 4  # of full fine-tuning, to find out how many fit into the minutes
FROZEN_SHARE = 2 / 3  # of the time of such a step, if weights are frozen: their gradients are a third of the arithmetic
RECORDS_PER_STEP = 16  # the global batch size that all scripts have by default


@dataclass(frozen=True)
class Candidate:
    """A row of the comparison: a script in finetune/, and flags that make it this method."""

    script: str
    flags: str = ""

    @property
    def method(self) -> str:
        """Its name in METHODS of runs/methods.py."""
        return self.script.removesuffix(".py")


QUERY_AND_VALUE = (
    "--lora.query true --lora.key false --lora.value true --lora.projection false --lora.mlp false --lora.head false"
)
ALL_LINEARS = (
    "--lora.query true --lora.key true --lora.value true --lora.projection true --lora.mlp true --lora.head false"
)

# learning rates are those of the scripts
CANDIDATES = {
    "full": Candidate("full.py"),
    "last 4 blocks": Candidate("full.py", "--train_only 4"),
    "LoRA, r 8, query and value": Candidate("lora.py", f"--lora.r 8 --lora.alpha 16 {QUERY_AND_VALUE}"),
    "LoRA, r 8, all linears": Candidate("lora.py", f"--lora.r 8 --lora.alpha 16 {ALL_LINEARS}"),
    "LoRA, r 64, all linears": Candidate("lora.py", f"--lora.r 64 --lora.alpha 128 {ALL_LINEARS}"),
    "QLoRA, r 8, query and value": Candidate(
        "lora.py", f"--quantize bnb.nf4 --lora.r 8 --lora.alpha 16 {QUERY_AND_VALUE}"
    ),
    "adapter": Candidate("adapter.py"),
    "adapter v2": Candidate("adapter_v2.py"),
}


@dataclass(frozen=True)
class Outcome:
    """The figures of a method that was trained: a row of the table."""

    method: str
    """The name in CANDIDATES."""
    trained: int
    """Number of trained parameters."""
    memory_gb: float
    """Peak memory of the process."""
    minutes: float
    """Time of the training steps, without loading and validating."""
    tokens_per_second: float
    val_loss: float
    size_mb: float
    """Size of what has to be kept of the training."""
    forgotten: float
    """How much higher the loss on the general text is than the base model's, in nats a token."""
    kl: float | None = None
    """KL(base || model) on that text, in nats a token. None in an outcome.json of November 2026."""


@dataclass(frozen=True)
class Budget:
    """What all methods have in common; kept in compare.json, so that an interrupted comparison goes on.

    Fields that are unset here (0 or None) match any stored value.
    """

    checkpoint_dir: str
    data_dir: str
    general_text: str
    """The sha256 of the text."""
    steps: int
    """Optimizer steps of each method. 0 if they are still to be found."""
    flags: list[str]
    """More flags for the scripts."""
    minutes: float | None = None
    """Minutes that all of it may take. None if steps or tokens were asked for."""
    records: str | None = None
    """The fingerprint of what lies in data_dir. None in a compare.json of November 2026."""

    @property
    def common_flags(self) -> list[str]:
        """Flags that all scripts get."""
        steps = str(self.steps)
        flags = {
            "--checkpoint_dir": self.checkpoint_dir,
            "--data_dir": self.data_dir,
            "--n_answers": "0",
            # an epoch has one step or more: with so many epochs it is max_steps that ends the run
            "--train.max_steps": steps,
            "--train.epochs": steps,
            "--train.eval_interval": steps,
            "--train.save_interval": "20",
        }
        words = []
        for flag, value in flags.items():
            words += [flag, value]
        return words + self.flags


def text_fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def records_fingerprint(data_dir: Path) -> str:
    """Changes with the records of either side: those that methods learn from, and those that they are compared on."""
    sides = (data_fingerprint(Dataset(data_dir, "train")), data_fingerprint(Dataset(data_dir, "val")))
    return text_fingerprint("\n".join(sides))


def check_comparison(
    names: Sequence[str], scripts: Path, budget: Budget, text: str, own_flags: Sequence[str] = ()
) -> None:
    """Finds everything that can be found wrong before the first run is launched.

    `own_flags` are those of the comparison itself, for "Did you mean".

    Raises:
        InputError: no matplotlib, no checkpoint, data or text, or they do not fit each other; or a method cannot be
            applied to the model, or has no such flags.
    """
    require_drawing()

    # data and text, for this model
    tokenizer = Tokenizer(budget.checkpoint_dir)
    config = Config.from_checkpoint(Path(budget.checkpoint_dir))
    for split, adjective in (("train", "training"), ("val", "validation")):
        data = Dataset(Path(budget.data_dir), split)  # type: ignore[arg-type] # one of these two
        data.check_can_train(tokenizer, config)
        if not len(data):
            raise InputError(f"{budget.data_dir} has no {adjective} records. Prepare the data with some.")
    general_records(text, tokenizer, config.block_size)

    # methods, on a model without weights
    if not budget.steps:
        budget = replace(budget, steps=PROBE_STEPS)
    for name in names:
        try:
            check_candidate(CANDIDATES[name], scripts, budget, config, own_flags)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def check_candidate(
    candidate: Candidate, scripts: Path, budget: Budget, config: Config, own_flags: Sequence[str]
) -> None:
    """Parses the flags of a run, and applies its method to a model without weights.

    Raises:
        InputError: the script has no such flags, the flags say when to stop, or see `setup_of_script` and `adapt`.
    """
    main = runpy.run_path(str(scripts / candidate.script))["main"]
    settings = parse(main, [*budget.common_flags, *candidate.flags.split()], also=own_flags)
    train = settings["train"]
    if train.max_steps != budget.steps or train.epochs != budget.steps:
        raise InputError(
            "--train.max_steps or --train.epochs says when to stop. Say it by --steps, --tokens or --minutes."
        )
    setup = setup_of_script(candidate.method, settings, config, tokens=1)
    adapt(build_model(config), setup)


def steps_for(tokens: int, data_dir: Path) -> int:
    """The optimizer steps of 16 records that read about so many tokens."""
    tokens_per_step = Dataset(data_dir, "train").lengths().mean() * RECORDS_PER_STEP
    return max(1, round(tokens / tokens_per_step))


def stored_budget(budget: Budget, out_dir: Path) -> Budget:
    """The budget of the comparison that `out_dir` holds already, if it holds one, else `budget`.

    Raises:
        InputError: the comparison there has another budget.
    """
    path = out_dir / "compare.json"
    if not path.is_file():
        out_dir.mkdir(parents=True, exist_ok=True)
        return budget

    stored = json.loads(path.read_text(encoding="utf-8"))
    changes = []
    for key, value in asdict(budget).items():
        is_known = stored.get(key) is not None or key != "records"
        if is_known and value not in (stored.get(key), 0, None):
            changes.append(f"{key} was {stored.get(key)}, now {value}")
    if changes:
        raise InputError(f"{out_dir} holds another comparison: {', '.join(changes)}. Name another --out_dir.")
    return Budget(**stored)


def write_budget(budget: Budget, out_dir: Path) -> None:
    write_whole(out_dir / "compare.json", json.dumps(asdict(budget), indent=2) + "\n")


def steps_within(minutes: float, names: Sequence[str], scripts: Path, budget: Budget, out_dir: Path) -> int:
    """How many steps each method can take so that all of it takes about so many minutes; 1 at the least.

    A few steps of full fine-tuning, the slowest method, tell what a step takes, and what comes with a run: starting,
    loading, validating before and after, saving.
    """
    # a run of a few steps
    began = time.perf_counter()
    budget = replace(budget, steps=PROBE_STEPS)
    probe = out_dir / "probe"
    run_script(scripts / "full.py", [*budget.common_flags, "--overwrite", "--out_dir", str(probe)])
    rows = read_metrics(probe / "metrics.csv")
    shutil.rmtree(probe)  # a model and its optimizer
    probe_seconds = time.perf_counter() - began

    # its times are those of all
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    steps, least = steps_that_fit(minutes, names, probe_seconds, seconds)
    if steps < 1:
        print(f"{minutes:g} minutes are too few: a step of each method takes about {least:.1f}.", file=sys.stderr)
    return max(1, steps)


def steps_that_fit(
    minutes: float, names: Sequence[str], probe_seconds: float, step_seconds: Sequence[float]
) -> tuple[int, float]:
    """The steps that each method can take, below 1 if the minutes are too few; and the minutes that would be enough.

    `probe_seconds` is what a run of full fine-tuning took, from its start to its end, `step_seconds` what each of its
    steps did. The run itself counts, too.
    """
    # a step, and the rest of a run. The first step also warms up; the flags may end the run after it
    rest_of_run = probe_seconds - sum(step_seconds)
    warm = step_seconds[1:] or step_seconds
    step = sum(warm) / len(warm)

    # a step of each method, and the rest of all runs
    left = minutes * 60 - probe_seconds - len(names) * rest_of_run
    step_of_all = 0.0
    for name in names:
        step_of_all += step if METHODS[CANDIDATES[name].method].trains_base else step * FROZEN_SHARE
    least = (minutes * 60 - left + step_of_all) / 60
    return math.floor(left / step_of_all), least


def run_script(script: Path, flags: Sequence[str]) -> None:
    """Runs a script in a process of its own.

    Raises:
        InputError: it failed, and has said why.
    """
    process = subprocess.run([sys.executable, str(script), *flags])
    if process.returncode:
        raise InputError(f"{script.name} failed, for the reason above: {' '.join(flags)}")


def train_candidate(name: str, scripts: Path, budget: Budget, folder: Path) -> None:
    """Trains, or goes on where the run in `folder` stopped."""
    candidate = CANDIDATES[name]
    begun = (folder / "last").is_dir()
    flags = [
        *budget.common_flags,
        *candidate.flags.split(),
        "--resume" if begun else "--overwrite",
        "--out_dir",
        str(folder),
    ]
    run_script(scripts / candidate.script, flags)


def measure_outcome(
    name: str, folder: Path, records: Sequence[Record], base: RememberedBase, base_loss: float
) -> Outcome:
    """The figures of a finished run. `base_loss` is the base model's loss on the general text's `records`."""
    rows = read_metrics(folder / "metrics.csv")
    steps = [row for row in rows if row["seconds"] is not None]
    val_losses = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    seconds = sum(row["seconds"] for row in steps)
    n_tokens = sum(row["tokens"] for row in steps)
    size = sum(path.stat().st_size for path in (folder / "best").iterdir())
    model, _ = load_finetuned(None, folder / "last")
    forgotten = forgetting(model, base, records)
    return Outcome(
        method=name,
        trained=trained_parameters(folder / "last"),
        memory_gb=max(row["memory_gb"] for row in steps),
        minutes=seconds / 60,
        tokens_per_second=n_tokens / seconds,
        val_loss=val_losses[-1],
        size_mb=size / 1e6,
        forgotten=forgotten.loss.mean - base_loss,
        kl=forgotten.kl.mean,
    )


def trained_parameters(folder: Path) -> int:
    """The number of parameters that the run which wrote `folder` has trained."""
    header = read_header(folder)
    # a file of what was trained
    if not METHODS[header.method].trains_base:
        return sum(tensor.numel() for _, tensor in read_tensors([finetuned_file(folder)]))

    # a whole model, of which some was trained
    model = build_model(Config.from_checkpoint(folder))
    chosen = set(mark_chosen_as_trainable(model, Full(**header.settings)))
    return sum(param.numel() for name, param in model.named_parameters() if name in chosen)


def compare(names: Sequence[str], scripts: Path, budget: Budget, text: str, out_dir: Path) -> list[Outcome]:
    """Trains and measures each method that is not done yet; writes compare.md and compare.png after each."""
    # what the base says about the general text
    model = load_model(Path(budget.checkpoint_dir))
    records = general_records(text, Tokenizer(budget.checkpoint_dir), model.config.block_size)
    base = remember_base(model, records)
    base_loss = forgetting(model, base, records).loss.mean
    del model  # before the first process needs the memory

    outcomes = []
    for name in names:
        folder = folder_of(name, out_dir)
        file = folder / "outcome.json"

        # train and measure
        if not file.is_file():
            print(f"\n{name}", file=sys.stderr, flush=True)
            train_candidate(name, scripts, budget, folder)
            outcome = measure_outcome(name, folder, records, base, base_loss)
            write_whole(file, json.dumps(asdict(outcome), indent=2) + "\n")
            gc.collect()  # the measured model, before the next process needs the memory
        shutil.rmtree(folder / "last", ignore_errors=True)  # it is for going on; what was trained is in `best`
        outcomes.append(Outcome(**json.loads(file.read_text(encoding="utf-8"))))

        # table and figure of all that are done
        first = loss_before([outcome.method for outcome in outcomes], out_dir)
        table = outcomes_table(outcomes, first, against_best(outcomes, out_dir))
        write_whole(out_dir / "compare.md", table + "\n")
        save_figure(outcomes_figure(outcomes, first), out_dir / "compare.png")
    return outcomes


def folder_of(name: str, out_dir: Path) -> Path:
    """The folder of a run: for "LoRA, r 8, all linears" it is out_dir/LoRA-r-8-all-linears."""
    return out_dir / name.replace(",", "").replace(" ", "-")


def loss_before(names: Sequence[str], out_dir: Path) -> float:
    """The validation loss before training: that of the base's own weights, if a run has not quantized them."""
    unquantized = [name for name in names if "--quantize" not in CANDIDATES[name].flags]
    name = unquantized[0] if unquantized else names[0]
    rows = read_metrics(folder_of(name, out_dir) / "metrics.csv")
    return rows[0]["val_loss"]


def against_best(outcomes: Sequence[Outcome], out_dir: Path) -> list[str]:
    """How much worse each method is than the one with the lowest validation loss, record by record, in words."""
    best = min(outcomes, key=lambda outcome: outcome.val_loss)
    of_best = last_losses(best.method, out_dir)
    sentences = []
    for outcome in outcomes:
        losses = last_losses(outcome.method, out_dir)
        if outcome is best:
            sentences.append("the best")
        elif losses is None or of_best is None:
            sentences.append("")
        else:
            sentences.append(in_words(paired_difference(of_best, losses), "it"))
    return sentences


def last_losses(name: str, out_dir: Path) -> RecordScores | None:
    """The losses of a run's last validation. None of a run of November 2026, which did not keep them."""
    file = folder_of(name, out_dir) / VAL_LOSSES
    if not file.is_file():
        return None
    return next(scores for scores in read_scores(file) if scores.measure == LAST)


def outcomes_table(outcomes: Sequence[Outcome], first: float, against_best: Sequence[str]) -> str:
    """A Markdown table, a row for each outcome.

    `first` is the validation loss before training, `against_best` says how each outcome compares with the best.
    """
    heads = (
        "method",
        "trained parameters",
        "peak memory",
        "training",
        "tokens/s",
        "validation loss",
        "against the best",
        "on disk",
        "forgotten",
        "KL to the base",
    )
    rows = []
    for outcome, sentence in zip(outcomes, against_best, strict=True):
        row = (
            outcome.method,
            f"{outcome.trained:,}",
            f"{outcome.memory_gb:.2f} GB",
            f"{outcome.minutes:.1f} min",
            f"{outcome.tokens_per_second:,.0f}",
            f"{outcome.val_loss:.3f}",
            sentence,
            f"{outcome.size_mb:,.1f} MB",
            f"{outcome.forgotten:+.3f}",
            "" if outcome.kl is None else f"{outcome.kl:.3f}",
        )
        rows.append(row)
    lines = markdown_table(heads, rows, right=[i for i in range(1, len(heads)) if heads[i] != "against the best"])
    return f"{lines}\n\nValidation loss before training: {first:.3f}. In brackets are 95 % intervals over records."


def outcomes_figure(outcomes: Sequence[Outcome], first: float) -> "Figure":
    """The validation loss against what it cost: memory, minutes, and what was forgotten."""
    figure, plots = new_row(13, 4.5, n_plots=3)
    costs = {"memory_gb": "peak memory, GB", "minutes": "training, minutes", "forgotten": "forgotten, nats a token"}
    for axes, (key, label) in zip(plots, costs.items(), strict=True):
        for i, outcome in enumerate(outcomes):
            axes.plot(getattr(outcome, key), outcome.val_loss, "o", markersize=9, color=f"C{i}", label=outcome.method)
        axes.set(xlabel=label)
        axes.margins(x=0.15, y=0.15)
        axes.locator_params(axis="x", nbins=4)  # the labels of more would overlap
        axes.grid(alpha=0.3)
    plots[0].set_ylabel(f"validation loss ({first:.2f} before)")
    plots[2].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
