"""How much memory a fine-tuning run will take, before any weight is loaded, on a machine without the GPU.

    python scripts/plan_memory.py --quantize bnb.nf4 --train.micro_batch_size 1 --card_gb 24
    python scripts/plan_memory.py finetune/full.py --model_name Llama-3.2-1B --tokens 1024
    python scripts/plan_memory.py --model_name Llama-3.3-70B-Instruct --tokens 2048 --card_gb 24 \\
        --quantize bnb.nf4-dq --stream_blocks true --train.micro_batch_size 1
    python scripts/plan_memory.py --model_name Mistral-7B-v0.1 --tokens 1304 \\
        --config finetune/recipes/mistral-7b-qlora-24gb.yaml
    python scripts/plan_memory.py --model_name Llama-3.1-8B --tokens 1024 --card_gb 24 --fit
"""

import math
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_gpt import Config, InputError, families
from lit_gpt.cli import PassedOn, flags_of, parse, read_hyperparameters, run
from lit_gpt.data.dataset import Dataset
from lit_gpt.device import own_card, resolve_precision
from lit_gpt.display.words import counted, duration
from lit_gpt.distributed import is_to_split
from lit_gpt.memory.fit import (
    HOST_PER_CARD,
    MOST_RECORDS,
    Search,
    Wish,
    flags_of_choice,
    largest_batch,
    lengths_of_step,
    usable_bytes,
)
from lit_gpt.memory.plan import (
    OUTSIDE_GB,
    Setup,
    check_method,
    plan,
    plan_generation,
    plans_table,
    setup_of_script,
    switches,
)
from lit_gpt.memory.probe import probe as probe_speed
from lit_gpt.memory.sharded import sharded_peak
from lit_gpt.memory.speed import Speed, card_named, card_of_driver, usual_card
from lit_gpt.ranges import check_range
from lit_gpt.recipe import check_streaming
from lit_gpt.runs.methods import METHODS
from lit_gpt.sharding import SPLIT_FLAG

ROOT = Path(__file__).parents[1]


def main(
    model_name: str | None = None,
    tokens: int | None = None,
    card_gb: float | None = None,
    fit: bool = False,
    card: str | None = None,
    probe: bool = False,
    host_gb: float | None = None,
    script: PassedOn = (),
) -> None:
    """Plan the memory of a fine-tuning script.

    The first word may be the script: finetune/lora.py, which is meant if there is none, full.py, adapter.py or
    adapter_v2.py. All flags that are not listed here are the script's own, such as --quantize or --config;
    `python finetune/lora.py --help` has them.

    Args:
        model_name: A published model; nothing of it has to be on this machine. None is the script's --checkpoint_dir.
        tokens: The length of the longest record. None looks into the script's --data_dir.
        card_gb: Memory of a GPU: finds the largest micro-batch that fits, which takes half a minute for a model of
            7B. If --precision is auto, bf16-true is meant then.
        fit: Find the settings with which a step takes the least time on that card, or on this machine's GPU: the
            micro-batch, what is computed again, quantized or streamed, and the optimizer. Prints the command to type.
            What the flags set stays as it is. Takes about a minute for a model of 8B.
        card: The card whose rates --fit counts with, such as RTX 4090, A100 80GB or H100 SXM. null is this machine's
            GPU, or a usual one of --card_gb.
        probe: Let --fit measure the rates of this machine instead, half a minute.
        host_gb: Memory of the host that --fit may give to streamed blocks. null is four times that of the card.
        script: The script, if its name is there, and its flags.
    """
    if card_gb is not None and not OUTSIDE_GB < card_gb < math.inf:
        raise InputError(f"--card_gb is {card_gb:g}, expected more than the {OUTSIDE_GB:g} that CUDA itself takes.")
    check_range("--tokens", tokens, at_least=1)
    check_range("--host_gb", host_gb, above=0)

    if fit:
        card_gb, speed = card_to_fit(card_gb, card)
        if card_gb <= OUTSIDE_GB:
            raise InputError(f"The card has {card_gb:g} GB, of which CUDA itself takes {OUTSIDE_GB:g}.")

    # the flags of the script, as it would parse them
    path, flags = split_script(script)
    check_method(path.stem)
    settings = parse(runpy.run_path(str(path))["main"], flags, also=flags_of(main))
    args = settings["args"]
    if settings.get("stream_blocks"):
        check_streaming(args)
    precision_is_auto = args.precision == "auto"
    if precision_is_auto and card_gb is not None:
        args = replace(args, precision="bf16-true")
        settings["args"] = args
    config = Config.from_name(model_name) if model_name else Config.from_checkpoint(args.checkpoint_dir)
    setup = setup_of_script(path.stem, settings, config, tokens)

    # what is planned
    longest = max(setup.lengths)
    weights = setup.quantize or str(setup.dtype).removeprefix("torch.")
    if setup.stream_blocks:
        weights += ", blocks streamed"
    n_processes = args.devices * args.num_nodes
    split = is_to_split(args.strategy, n_processes, shard=METHODS[setup.method].trains_base)
    when = ", before it is split among the devices" if split else ""
    n_records = counted(len(setup.lengths), "record")
    if fit:
        if split:
            raise InputError(f"--fit is for a device that holds all of the model: leave out {SPLIT_FLAG}, or --fit.")
        if probe:
            print("Measuring this machine ...", file=sys.stderr)
            speed = probe_speed(setup)
        print_fit(path, script, model_name, tokens, setup, settings, card_gb, speed, host_gb)
        return
    if precision_is_auto:
        print(why_this_precision(card_gb))
    print(
        f"{config.name}, {setup.method}, {weights}, {n_records} of up to {longest:,} tokens:"
        f" GB at the peak of a step{when}\n"
    )

    # the plan, each way to need less, and generating
    plans = [("as it is set", plan(setup))]
    print(f"As it is set: {plans[0][1]}. Other switches and batches follow, each takes as long ...", file=sys.stderr)
    for switch, smaller in switches(setup).items():
        plans.append((f"with `{switch}`", plan(smaller)))
    plans.append(("generating 256 tokens", plan_generation(setup)))
    print(plans_table(plans))
    on_host = max(peak.host_bytes for _, peak in plans)
    if on_host:
        print(f"\nWith --stream_blocks the blocks take {on_host / 1e9:.1f} GB of the host's memory instead, pinned.")
    if split:
        each = {"as it is set": setup, **{f"with `{name}`": smaller for name, smaller in switches(setup).items()}}
        print(f"\nEach of the {n_processes} devices takes, when the model is split among them:\n")
        for name, of_row in each.items():
            print(f"    {sharded_peak(of_row, n_processes) / 1e9:6.2f} GB {name}")

    # what fits on a card
    if card_gb is not None:
        usable = card_gb - OUTSIDE_GB
        most = largest_batch(replace(setup, lengths=(longest,)), usable)
        size = f"{most} or more" if most == MOST_RECORDS else most
        print(f"\nOn a card of {card_gb:g} GB, of which {usable:.3g} are usable, --train.micro_batch_size {size} fits.")


def card_to_fit(card_gb: float | None, name: str | None) -> tuple[float, Speed]:
    """The memory of the card, and its rates: those of a name, of this machine's GPU, or of a usual card.

    Raises:
        InputError: nothing says which card is meant.
    """
    if name is not None:
        speed = card_named(name)
        return card_gb or speed.gb, speed
    if card_gb is not None:
        return card_gb, usual_card(card_gb)
    own = own_card()
    if own is None:
        raise InputError("--fit needs a card, and this machine has none: give --card_gb 24, or --card 'RTX 4090'.")
    own_name, own_gb = own
    return own_gb, card_of_driver(own_name, own_gb) or usual_card(own_gb)


# a field of Setup -> the flags that decide it
DECIDED_BY = {
    "lengths": ("--train.micro_batch_size", "--train.micro_batch_tokens"),
    "activation_checkpointing": ("--activation_checkpointing",),
    "quantize": ("--quantize",),
    "stream_blocks": ("--stream_blocks",),
    "optimizer": ("--optimizer",),
    "optimizer_in_backward": ("--train.optimizer_in_backward",),
}


def fixed_by(words: Sequence[str]) -> frozenset[str]:
    """The fields of Setup that a command line decides, by a flag or in the file of --config."""
    typed = set()
    for i, word in enumerate(words):
        flag, _, value = word.partition("=")
        typed.add(flag)
        if flag == "--config":
            path = value or next(iter(words[i + 1 :]), "")
            typed |= {f"--{key}" for key in keys_of(read_hyperparameters(Path(path)))}
    return frozenset(field for field, flags in DECIDED_BY.items() if typed.intersection(flags))


def keys_of(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of settings, those in a group with its name before them: train.micro_batch_size."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def print_fit(
    path: Path,
    script: Sequence[str],
    model_name: str | None,
    tokens: int | None,
    setup: Setup,
    settings: dict[str, Any],
    card_gb: float,
    speed: Speed,
    host_gb: float | None,
) -> None:
    """Finds the settings that fit, and prints the command to type, what it takes, and the second best."""
    args = settings["args"]
    train = settings["train"]
    _, flags = split_script(script)

    # the records of a step on one device
    if tokens is None:
        lengths = lengths_of_step(args.data_dir, train, args.devices * args.num_nodes)
    else:
        n_records = math.ceil(train.global_batch_size / (args.devices * args.num_nodes))
        lengths = (tokens,) * n_records
    wish = Wish(
        setup=setup,
        lengths=lengths,
        usable=usable_bytes(card_gb),
        speed=speed,
        compiled=speed.overlaps and args.compile is not False,
        host=1e9 * (HOST_PER_CARD * card_gb if host_gb is None else host_gb),
        clips=train.max_norm is not None,
        fixed=fixed_by(flags),
    )
    search = Search(wish)
    first, second = search.best()

    # what to type
    words = ["python", f"finetune/{path.name}", *flags]
    if model_name is not None and not any(word.startswith("--checkpoint_dir") for word in flags):
        repos = [repo for repo in families.published() if model_name in (repo, repo.split("/")[-1])]
        words += ["--checkpoint_dir", f"checkpoints/{repos[0]}"]
    chosen = flags_of_choice(first, wish)
    step_tokens = sum(lengths)
    speed_now = step_tokens / first.seconds
    print(
        f"{setup.config.name}, {setup.method}, on a card of {card_gb:.3g} GB, of which {card_gb - OUTSIDE_GB:.3g} are"
        f" usable; time by the rates of {speed.name}. Type:\n\n    {shlex.join(words + chosen)}\n"
    )
    host = f", and {first.host_bytes / 1e9:.1f} GB of the host's memory" if first.host_bytes else ""
    print(f"Peak of a step: {first.profile.peak / 1e9:.2f} GB{host}.")
    passes = f"{first.n_passes} micro-batches" if first.n_passes > 1 else "one micro-batch"
    epoch = ""
    if tokens is None:
        n_tokens = int(Dataset(args.data_dir, "train").lengths().sum())
        epoch = f"; {duration(n_tokens / speed_now / (args.devices * args.num_nodes))} for an epoch"
    print(f"Time: {speed_now:,.0f} tokens/s, {first.seconds:.3g} s for a step of {passes}{epoch}.")
    why = search.why_result_changes(first)
    if why:
        print(why)
    if second is None:
        print("There is no second best that fits.")
    else:
        slower = 100 * (second.seconds / first.seconds - 1)
        others = " ".join(flags_of_choice(second, wish)) or "as it is set"
        time = f"{slower:.0f} % slower" if slower >= 1 else "as fast"
        print(f"Second best: {others} ({second.profile.peak / 1e9:.2f} GB; {time}).")


def split_script(words: Sequence[str]) -> tuple[Path, Sequence[str]]:
    """The script that is planned, and its flags. `finetune/full.py` is found from any folder."""
    name = "finetune/lora.py"
    if words and not words[0].startswith("-"):
        name, *words = words
    path = Path(name)
    return (path if path.is_file() else ROOT / path), words


def why_this_precision(card_gb: float | None) -> str:
    """What --precision auto is planned as, and how to plan another one."""
    if card_gb is not None:
        return "Precision: bf16-true, as on a GPU, since --card_gb is given. --precision names another one."
    precision = resolve_precision("auto")
    if precision == "bf16-true":
        return "Precision: bf16-true, as on the GPU of this machine. --precision names another one."
    return f"Precision: {precision}, as on this machine. For a GPU give --card_gb, or --precision bf16-true."


if __name__ == "__main__":
    run(main)
