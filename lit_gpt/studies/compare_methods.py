"""What each method costs and gives: runs of the scripts in finetune/ on the same records, side by side.

Every method is trained by its own script in a process of its own, so that its peak memory is its own. All see the same
records in the same order. How much a model forgot is how much its loss rose on a text that has nothing to do with the
data."""

import gc
import hashlib
import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lit_gpt.checkpoint.load import build_model, load_model, read_tensors
from lit_gpt.cli import parse
from lit_gpt.config import Config
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.display.figures import new_row, require_drawing, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.errors import InputError
from lit_gpt.files import write_whole
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.memory.plan import adapt, setup_of_script
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Layout
from lit_gpt.runs.header import finetuned_file, read_header
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.log import read_metrics
from lit_gpt.runs.methods import METHODS as TRAINABLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Method(NamedTuple):
    script: str
    flags: str = ""


METHODS = {  # learning rates are those of the scripts
    "full": Method("full.py"),
    "last 4 blocks": Method("full.py", "--train_only 4"),
    "LoRA, r 8": Method("lora.py"),
    "LoRA, r 8, all linears": Method("lora.py", "--lora.key true --lora.projection true --lora.mlp true"),
    "LoRA, r 64, all linears": Method(
        "lora.py", "--lora.r 64 --lora.alpha 128 --lora.key true --lora.projection true --lora.mlp true"
    ),
    "QLoRA, r 8": Method("lora.py", "--quantize bnb.nf4"),
    "adapter": Method("adapter.py"),
    "adapter v2": Method("adapter_v2.py"),
}
PROBE_STEPS = 4  # of full fine-tuning, to find out how many fit into the minutes


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    method: str
    trained: int
    """Parameters."""
    memory_gb: float
    """The most that the process held."""
    minutes: float
    """Of the training steps alone."""
    tokens_per_second: float
    val_loss: float
    size_mb: float
    """Of what has to be kept of the training."""
    forgotten: float
    """How much higher the loss on the general text is than the base model's, in nats a token."""


@dataclass(frozen=True)
class Budget:
    """What all methods have in common; kept in compare.json, so that an interrupted comparison goes on."""

    checkpoint_dir: str
    data_dir: str
    general_text: str
    """The sha256 of it."""
    steps: int
    """0 where they are still to be found."""
    flags: list[str]
    minutes: float | None = None
    """None where steps or tokens were asked for."""

    @property
    def common(self) -> list[str]:
        return [
            *("--checkpoint_dir", self.checkpoint_dir, "--data_dir", self.data_dir, "--n_answers", "0"),
            # an epoch has one step or more: with so many epochs it is max_steps that ends the run
            *("--train.max_steps", str(self.steps), "--train.epochs", str(self.steps)),
            *("--train.eval_interval", str(self.steps), "--train.save_interval", "20", *self.flags),
        ]


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check(names: Sequence[str], scripts: Path, budget: Budget, text: str) -> None:
    """Looks at everything that can be found wrong before the first run is launched.

    Raises:
        InputError: no matplotlib, no checkpoint, data or text, or they do not fit each other; or a method cannot be
            applied to the model, or has no such flags.
    """
    require_drawing()
    tokenizer, config = Tokenizer(budget.checkpoint_dir), Config.from_checkpoint(budget.checkpoint_dir)
    for split, name in (("train", "training"), ("val", "validation")):
        data = Dataset(Path(budget.data_dir), split)
        data.check_fits(tokenizer, config)
        if not len(data):
            raise InputError(f"{budget.data_dir} has no {name} records. Prepare the data with some.")
    if not paragraphs(text, tokenizer, config.block_size):
        raise InputError("The general text has no paragraph of two tokens or more: nothing to measure forgetting on.")
    budget = replace(budget, steps=budget.steps or PROBE_STEPS)
    for name in names:
        script, flags = METHODS[name]
        try:
            settings = parse(runpy.run_path(str(scripts / script))["main"], [*budget.common, *flags.split()])
            if (settings["train"].max_steps, settings["train"].epochs) != (budget.steps, budget.steps):
                raise InputError("--flags says when to stop. That is for --steps, --tokens or --minutes.")
            adapt(build_model(config), setup_of_script(script.removesuffix(".py"), settings, config, tokens=1))
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def steps_for(tokens: int, data_dir: Path) -> int:
    """The optimizer steps of 16 records that read about so many tokens."""
    return max(1, round(tokens / (Dataset(data_dir, "train").lengths().mean() * 16)))


def settle(budget: Budget, out_dir: Path) -> Budget:
    """The budget of the comparison that `out_dir` holds already, else this one. What this one does not say may be any.

    Raises:
        InputError: a comparison of something else is there.
    """
    path = out_dir / "compare.json"
    if path.is_file():
        found, now = json.loads(path.read_text(encoding="utf-8")), asdict(budget)
        changed = [key for key in now if now[key] not in (found.get(key), 0, None)]
        if changed:
            what = ", ".join(f"{key} was {found.get(key)}, now {now[key]}" for key in changed)
            raise InputError(f"{out_dir} holds another comparison: {what}. Name another --out_dir.")
        return Budget(**found)
    out_dir.mkdir(parents=True, exist_ok=True)
    return budget


def write_budget(budget: Budget, out_dir: Path) -> None:
    write_whole(out_dir / "compare.json", json.dumps(asdict(budget), indent=2) + "\n")


def seconds_per_step(scripts: Path, budget: Budget, out_dir: Path) -> float:
    """Of full fine-tuning, the slowest, in its first steps, which are the heaviest."""
    budget, probe = replace(budget, steps=PROBE_STEPS), out_dir / "probe"
    run_script(scripts / "full.py", [*budget.common, "--overwrite", "true", "--out_dir", str(probe)])
    times = [row["seconds"] for row in read_metrics(probe / "metrics.csv") if row["seconds"] is not None]
    times = times[1:] or times  # the flags may end it after one
    return sum(times) / len(times)


def run_script(script: Path, flags: Sequence[str]) -> None:
    if subprocess.run([sys.executable, str(script), *flags]).returncode:
        raise InputError(f"{script.name} failed, for the reason above: {' '.join(flags)}")


def train_method(name: str, scripts: Path, budget: Budget, folder: Path) -> None:
    """Trains, or goes on where the run in `folder` stopped."""
    method = METHODS[name]
    again = ["--resume", "true"] if (folder / "last").is_dir() else ["--overwrite", "true"]
    run_script(scripts / method.script, [*budget.common, *method.flags.split(), *again, "--out_dir", str(folder)])


def measure(name: str, folder: Path, text: str, base_loss: float) -> Outcome:
    """What a finished run cost and gave."""
    rows = read_metrics(folder / "metrics.csv")
    steps = [row for row in rows if row["seconds"] is not None]
    seconds = sum(row["seconds"] for row in steps)
    model, description = load_finetuned(None, folder / "last")
    return Outcome(
        method=name,
        trained=trained_parameters(folder / "last"),
        memory_gb=max(row["memory_gb"] for row in steps),
        minutes=seconds / 60,
        tokens_per_second=sum(row["tokens"] for row in steps) / seconds,
        val_loss=next(row["val_loss"] for row in reversed(rows) if row["val_loss"] is not None),
        size_mb=sum(path.stat().st_size for path in (folder / "best").iterdir()) / 1e6,
        forgotten=text_loss(model, Tokenizer(description.checkpoint_dir), text) - base_loss,
    )


def trained_parameters(folder: Path) -> int:
    description = read_header(folder)
    if not TRAINABLE[description.method].trains_base:
        return sum(tensor.numel() for _, tensor in read_tensors([finetuned_file(folder)]))
    model = build_model(Config.from_checkpoint(folder))
    chosen = set(mark_chosen_as_trainable(model, Full(**description.settings)))
    return sum(param.numel() for name, param in model.named_parameters() if name in chosen)


@torch.no_grad()
def text_loss(model: GPT, tokenizer: Tokenizer, text: str) -> float:
    """Mean loss per token of the paragraphs of a text, in nats."""
    device, loss, targets = next(model.parameters()).device, 0.0, 0
    for ids in paragraphs(text, tokenizer, model.config.block_size):
        idx, layout = Layout.end_to_end([(ids, torch.ones(len(ids)))])
        loss += model(idx.to(device), layout=layout.to(device)).item()
        targets += layout.n_targets
    return loss / targets


def paragraphs(text: str, tokenizer: Tokenizer, limit: int) -> list[torch.Tensor]:
    """The tokens of each, at most `limit`. The first is not predicted: one that has no other is left out."""
    found = (tokenizer.encode(part.strip())[:limit] for part in text.split("\n\n") if part.strip())
    return [ids for ids in found if len(ids) > 1]


def compare(names: Sequence[str], scripts: Path, budget: Budget, text: str, out_dir: Path) -> list[Outcome]:
    """Trains and measures each method that is not done yet; writes compare.md and compare.png after each."""
    outcomes, tokenizer = [], Tokenizer(budget.checkpoint_dir)
    base_loss = text_loss(load_model(Path(budget.checkpoint_dir)), tokenizer, text)
    for name in names:
        folder = folder_of(name, out_dir)
        done = folder / "outcome.json"
        if not done.is_file():
            print(f"\n{name}", file=sys.stderr, flush=True)
            train_method(name, scripts, budget, folder)
            write_whole(done, json.dumps(asdict(measure(name, folder, text, base_loss)), indent=2) + "\n")
            gc.collect()
        outcomes.append(Outcome(**json.loads(done.read_text(encoding="utf-8"))))
        first = loss_before([outcome.method for outcome in outcomes], out_dir)
        write_whole(out_dir / "compare.md", table(outcomes, first) + "\n")
        save_figure(figure(outcomes, first), out_dir / "compare.png")
    return outcomes


def folder_of(name: str, out_dir: Path) -> Path:
    return out_dir / name.replace(",", "").replace(" ", "-")


def loss_before(names: Sequence[str], out_dir: Path) -> float:
    """The validation loss before training: that of a base whose weights are not quantized, where there is one."""
    name = next((name for name in names if "--quantize" not in METHODS[name].flags), names[0])
    return read_metrics(folder_of(name, out_dir) / "metrics.csv")[0]["val_loss"]


def table(outcomes: Sequence[Outcome], first: float) -> str:
    """Markdown. `first` is the validation loss before training."""
    heads = (
        "method",
        "trained parameters",
        "peak memory",
        "training",
        "tokens/s",
        "validation loss",
        "on disk",
        "forgotten",
    )
    rows = []
    for outcome in outcomes:
        row = (
            outcome.method,
            f"{outcome.trained:,}",
            f"{outcome.memory_gb:.2f} GB",
            f"{outcome.minutes:.1f} min",
            f"{outcome.tokens_per_second:,.0f}",
            f"{outcome.val_loss:.3f}",
            f"{outcome.size_mb:,.1f} MB",
            f"{outcome.forgotten:+.3f}",
        )
        rows.append(row)
    lines = markdown_table(heads, rows, right=range(1, len(heads)))
    return f"{lines}\n\nValidation loss before training: {first:.3f}."


def figure(outcomes: Sequence[Outcome], first: float) -> "Figure":
    """The validation loss against what it cost: memory, minutes, and what was forgotten."""
    figure, plots = new_row(13, 4.5, n_plots=3)
    costs = {"memory_gb": "peak memory, GB", "minutes": "training, minutes", "forgotten": "forgotten, nats a token"}
    for axes, (key, label) in zip(plots, costs.items(), strict=True):
        for i, outcome in enumerate(outcomes):
            axes.plot(getattr(outcome, key), outcome.val_loss, "o", markersize=9, color=f"C{i}", label=outcome.method)
        axes.set(xlabel=label)
        axes.margins(x=0.15, y=0.15)
        axes.grid(alpha=0.3)
    plots[0].set_ylabel(f"validation loss ({first:.2f} before)")
    plots[2].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
