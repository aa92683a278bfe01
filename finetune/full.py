"""Fine-tune the weights themselves, all of them or some.

python finetune/full.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/full.py --train_only 4
python finetune/full.py --train_only '["transformer.h.2[0-9].mlp", transformer.ln_f]'
python finetune/full.py --precision bf16-mixed --activation_checkpointing block
"""

from pathlib import Path

from lit_gpt import Config, Tokenizer
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.cli import Flags, run
from lit_gpt.data.dataset import Dataset
from lit_gpt.device import weight_dtype
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.generate.answers import answers
from lit_gpt.memory.plan import print_plan
from lit_gpt.recipe import RunArgs, answers_of_this_process, new_checkpoints, set_blocks, start_processes
from lit_gpt.runs.out_dir import claim_out_dir, start_run
from lit_gpt.runs.report import report_run
from lit_gpt.sharding import loading_device
from lit_gpt.train import TrainArgs, fit


def main(
    args: Flags[RunArgs] = RunArgs(out_dir=Path("out/full/docstrings")),
    full: Flags[Full] = Full(train_only=None),
    train: TrainArgs = TrainArgs(learning_rate=5e-5, warmup_steps=10, global_batch_size=16, epochs=1),
) -> None:
    """Fine-tune all weights, or some.

    Args:
        args: The flags of every recipe, such as --checkpoint_dir and --data_dir; see lit_gpt/recipe.py.
        full: Which weights train: --train_only; see lit_gpt/full.py. `best` is a Hugging Face folder.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
    """
    # settings: all of them, for hyperparameters.yaml
    settings = vars(args) | vars(full) | {"train": train}
    claim_out_dir(args.out_dir, args.resume, args.overwrite)

    # data: prepared for this model and its tokenizer
    tokenizer = Tokenizer(args.checkpoint_dir)
    config = Config.from_checkpoint(args.checkpoint_dir)
    train_data = Dataset(args.data_dir, "train")
    val_data = Dataset(args.data_dir, "val")
    train_data.check_fits(tokenizer, config)

    # device: from here on, one process for each; several split the weights among them
    fabric = start_processes(args, trains_base=True, shard=True)

    # build, load, choose what trains
    model = build_model(config)  # no weights yet
    base = load_weights(model, args.checkpoint_dir, weight_dtype(args.precision), loading_device(fabric))
    mark_chosen_as_trainable(model, full)
    set_blocks(model, args)

    # what the run writes: hyperparameters.yaml now, `last` and `best` while it trains
    start_run(fabric, args.out_dir, settings)
    checkpoints = new_checkpoints("full", full, args, model, base, tokenizer, train_data)
    print_plan(fabric, checkpoints.method, settings | {"full": full}, config, train_data)  # you may delete this

    # answers before, training, answers after by the best weights, report
    n_answers = answers_of_this_process(fabric, args)
    before = answers(model, tokenizer, val_data, n_answers)
    log = fit(
        fabric,
        model,
        train_data,
        val_data,
        train,
        checkpoints,
        resume=args.resume,
        show_sample=lambda: answers(model, tokenizer, val_data, min(n_answers, 1)),
        optimizer_class=args.optimizer,
    )
    if n_answers:
        checkpoints.load("best")  # what --finetuned will use
    after = answers(model, tokenizer, val_data, n_answers)
    report_run(fabric, log, args.out_dir, "Full fine-tuning", settings, before, after)


if __name__ == "__main__":
    run(main)
