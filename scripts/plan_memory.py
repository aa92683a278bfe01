"""How much memory a fine-tuning run will take, before any weight is loaded, on a machine without the GPU.

    python scripts/plan_memory.py --flags '[--quantize, bnb.nf4]' --card_gb 24
    python scripts/plan_memory.py --script finetune/full.py --model_name Llama-3.2-1B --tokens 1024
    python scripts/plan_memory.py --model_name Mistral-7B-v0.1 --tokens 1304 \\
        --flags '[--config, finetune/recipes/mistral-7b-qlora-24gb.yaml]'
"""

import runpy
from dataclasses import replace
from pathlib import Path

from lit_gpt import Config, InputError
from lit_gpt.cli import parse, run
from lit_gpt.distributed import is_to_split
from lit_gpt.memory import plan as memory
from lit_gpt.memory.plan import largest_batch, plan, plan_generation, switches, table
from lit_gpt.runs.methods import METHODS

ROOT = Path(__file__).parents[1]


def main(
    script: Path = Path("finetune/lora.py"),
    flags: list[str] | None = None,
    model_name: str | None = None,
    tokens: int | None = None,
    card_gb: float | None = None,
) -> None:
    """Plan the memory of a fine-tuning script.

    Args:
        script: finetune/lora.py, full.py, adapter.py or adapter_v2.py.
        flags: The script's own flags.
        model_name: A published model, of which nothing has to be here. None is the script's --checkpoint_dir.
        tokens: The length of the longest record. None looks into the script's --data_dir.
        card_gb: Memory of a GPU: finds the largest micro-batch that fits, which takes a minute or two for a model of
            7B. Where --precision is auto, bf16-true is meant then.
    """
    if card_gb is not None and card_gb <= memory.OUTSIDE_GB:
        raise InputError(
            f"--card_gb is {card_gb:g}, expected more than the {memory.OUTSIDE_GB:g} that CUDA itself takes."
        )
    path = script if script.is_file() else ROOT / script
    memory.check_method(path.stem)
    settings = parse(runpy.run_path(str(path))["main"], flags or [])
    args = settings["args"]
    if args.precision == "auto" and card_gb is not None:
        settings["args"] = args = replace(args, precision="bf16-true")
    config = Config.from_name(model_name) if model_name else Config.from_checkpoint(args.checkpoint_dir)
    setup = memory.setup_of_script(path.stem, settings, config, tokens)

    n, longest = len(setup.lengths), max(setup.lengths)
    what = f"{setup.quantize or str(setup.dtype).removeprefix('torch.')}, {n} records of up to {longest:,} tokens"
    n_processes = args.devices * args.num_nodes
    split = is_to_split(args.strategy, n_processes, shard=METHODS[setup.method].trains_base)
    when = ", before it is split among the devices" if split else ""
    print(f"{config.name}, {setup.method}, {what}: GB at the peak of a step{when}\n")
    rows = [("as it is set", plan(setup))]
    rows += [(f"with `{switch}`", plan(other)) for switch, other in switches(setup).items()]
    rows.append(("generating 256 tokens", plan_generation(setup)))
    print(table(rows))
    if card_gb is not None:
        usable = card_gb - memory.OUTSIDE_GB
        most = largest_batch(replace(setup, lengths=(longest,)), usable)
        print(f"\nOn a card of {card_gb:g} GB, of which {usable:.3g} are usable, --train.micro_batch_size {most} fits.")


if __name__ == "__main__":
    run(main)
