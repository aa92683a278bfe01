"""Fine-tune the weights themselves, all of them or some.

python finetune/full.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/full.py --train_only 4
python finetune/full.py --train_only '["transformer.h.2[0-9].mlp", transformer.ln_f]'
python finetune/full.py --precision bf16-mixed --activation_checkpointing block
"""

from pathlib import Path

from lit_gpt import GPT, Config, Tokenizer
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.cli import Flags, run
from lit_gpt.data.dataset import open_splits
from lit_gpt.device import weight_dtype
from lit_gpt.evaluation.forgetting_in_training import general_text_of
from lit_gpt.evaluation.validation_metric import validation_metric
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.generate.answers import answers
from lit_gpt.memory.plan import print_plan
from lit_gpt.recipe import (
    RunArgs,
    new_checkpoints,
    number_of_answers,
    recompute_or_compile_blocks,
    saves_slices,
    start_processes,
)
from lit_gpt.runs.methods import METHODS
from lit_gpt.runs.out_dir import claim_out_dir, start_run
from lit_gpt.runs.report import report_run
from lit_gpt.runs.saves import Checkpoints
from lit_gpt.sharding import mesh_of, split_among_devices
from lit_gpt.train import TrainArgs, check_run, fit


def main(
    args: Flags[RunArgs] = RunArgs(out_dir=Path("out/full/docstrings")),
    full: Flags[Full] = Full(train_only=None),
    save_slices: bool | None = None,
    train: TrainArgs = TrainArgs(learning_rate=5e-5, warmup_steps=10, global_batch_size=16, epochs=1),
) -> None:
    """Fine-tune all weights, or some.

    Args:
        args: Each of its fields is a flag, as in every recipe: --checkpoint_dir, --data_dir ...; see lit_gpt/recipe.py.
        full: Which weights train: --train_only; see lit_gpt/full.py. `best` is a Hugging Face folder.
        save_slices: With several devices let each write its own slice of `last`, in place of the first one all of it.
            null does so from 32 GB on.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
    """
    # settings: all flags, for hyperparameters.yaml and the report
    settings = vars(args) | vars(full) | {"save_slices": save_slices, "train": train}
    # refused if in use, or not empty and without a flag
    claim_out_dir(args.out_dir, args.resume, args.overwrite, args.checkpoint_dir)

    # data: prepared for this model and its tokenizer, and mapped into memory
    tokenizer = Tokenizer(args.checkpoint_dir)
    config = Config.from_checkpoint(args.checkpoint_dir)
    train_data, val_data = open_splits(args.data_dir, tokenizer, config)
    check_run(train_data, val_data, train)  # what the settings need of the data
    # what validations measure besides the loss: None, unless --train.metric or --train.watch_forgetting says so
    metric = validation_metric(train, tokenizer, val_data)
    general_text = general_text_of(train, tokenizer, config, METHODS["full"])

    # devices: with --devices 2 two processes of this command are started here, and this one only waits for them
    fabric = start_processes(args, trains_base=True, shard=True, optimizer_in_backward=train.optimizer_in_backward)

    # build, load, choose what trains
    model: GPT = build_model(config)  # no weights yet
    dtype = weight_dtype(args.precision)
    base_fingerprint = load_weights(model, args.checkpoint_dir, dtype, fabric.device, mesh_of(fabric))
    mark_chosen_as_trainable(model, full)
    recompute_or_compile_blocks(model, args)  # as --activation_checkpointing and --compile say
    split_among_devices(fabric, model)  # with --strategy fsdp each device keeps a slice of every weight
    in_slices = saves_slices(model, save_slices)  # as --save_slices says, or the size of the model

    # out_dir: --overwrite sets the old run aside until this one has saved, --resume refuses other settings than its
    # own. Then hyperparameters.yaml is written. `fit` will save the whole model to `best` and `last`, as Hugging Face
    # folders
    start_run(fabric, args.out_dir, settings)
    method = METHODS["full"]  # a name and a filter, for saving: all tensors
    checkpoints: Checkpoints = new_checkpoints(
        method, full, args, model, base_fingerprint, tokenizer, train_data, in_slices
    )
    # a step's memory, worked out; you may delete this line
    print_plan(fabric, method, settings | {"full": full}, config, train_data)

    # answers before, training, answers after by the best weights, report
    n_answers = number_of_answers(fabric, args)  # the first process gives them all, or all do if the model is split
    before = answers(model, tokenizer, val_data, n_answers)
    log = fit(
        fabric,
        model,
        train_data,
        val_data,
        train,
        checkpoints,
        resume=args.resume,
        show_sample=lambda: answers(model, tokenizer, val_data, min(n_answers, 1)),  # one, or none
        optimizer_path=args.optimizer,
        metric=metric,
        general_text=general_text,
    )
    if n_answers:
        checkpoints.load("best")  # the weights that generate/base.py --finetuned uses
    after = answers(model, tokenizer, val_data, n_answers)
    report_run(fabric, log, args.out_dir, method.title, settings, before, after)  # report.md and loss.png


if __name__ == "__main__":
    run(main)  # its parameters become flags; --config reads them from a file
