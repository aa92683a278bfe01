"""How much memory a fine-tuning run will take, before any weight is loaded, on a machine without the GPU.

    python scripts/plan_memory.py --quantize bnb.nf4 --train.micro_batch_size 1 --card_gb 24
    python scripts/plan_memory.py finetune/full.py --model_name Llama-3.2-1B --tokens 1024
    python scripts/plan_memory.py --model_name Llama-3.3-70B-Instruct --tokens 2048 --card_gb 24 \\
        --quantize bnb.nf4-dq --stream_blocks true --train.micro_batch_size 1
    python scripts/plan_memory.py --model_name Mistral-7B-v0.1 --tokens 1304 \\
        --config finetune/recipes/mistral-7b-qlora-24gb.yaml
"""

import math
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lit_gpt import Config, InputError
from lit_gpt.cli import PassedOn, flags_of, parse, run
from lit_gpt.device import resolve_precision
from lit_gpt.display.words import counted
from lit_gpt.distributed import is_to_split
from lit_gpt.memory.plan import (
    MOST_RECORDS,
    OUTSIDE_GB,
    check_method,
    largest_batch,
    plan,
    plan_generation,
    plans_table,
    setup_of_script,
    switches,
)
from lit_gpt.ranges import check_range
from lit_gpt.recipe import check_streaming
from lit_gpt.runs.methods import METHODS

ROOT = Path(__file__).parents[1]


def main(
    model_name: str | None = None,
    tokens: int | None = None,
    card_gb: float | None = None,
    script: PassedOn = (),
) -> None:
    """Plan the memory of a fine-tuning script.

    The first word may be the script: finetune/lora.py, which is meant if there is none, full.py, adapter.py or
    adapter_v2.py. All flags that are not listed here are the script's own, such as --quantize or --config;
    `python finetune/lora.py --help` has them.

    Args:
        model_name: A published model; nothing of it has to be on this machine. None is the script's --checkpoint_dir.
        tokens: The length of the longest record. None looks into the script's --data_dir.
        card_gb: Memory of a GPU: finds the largest micro-batch that fits, which takes a minute or two for a model of
            7B. If --precision is auto, bf16-true is meant then.
        script: The script, if its name is there, and its flags.
    """
    if card_gb is not None and not OUTSIDE_GB < card_gb < math.inf:
        raise InputError(f"--card_gb is {card_gb:g}, expected more than the {OUTSIDE_GB:g} that CUDA itself takes.")
    check_range("--tokens", tokens, at_least=1)

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

    # what fits on a card
    if card_gb is not None:
        usable = card_gb - OUTSIDE_GB
        most = largest_batch(replace(setup, lengths=(longest,)), usable)
        size = f"{most} or more" if most == MOST_RECORDS else most
        print(f"\nOn a card of {card_gb:g} GB, of which {usable:.3g} are usable, --train.micro_batch_size {size} fits.")


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
