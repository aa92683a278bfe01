"""Fine-tune with LoRA; with QLoRA where the base is quantized.

python finetune/lora.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/lora.py --lora.r 16 --lora.mlp true --train.learning_rate 2e-4
python finetune/lora.py --config finetune/recipes/quickstart.yaml
python finetune/lora.py --quantize bnb.nf4
python finetune/lora.py --devices 2
"""

from pathlib import Path

from lit_gpt import Config, Tokenizer
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.cli import Flags, run
from lit_gpt.data.dataset import Dataset
from lit_gpt.device import weight_dtype
from lit_gpt.generate.answers import answers
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.memory.plan import print_plan
from lit_gpt.quantize import Quantize, quantize_linears
from lit_gpt.recipe import RunArgs, answers_of_this_process, new_checkpoints, set_blocks, start_processes
from lit_gpt.runs.out_dir import claim_out_dir, start_run
from lit_gpt.runs.report import report_run
from lit_gpt.sharding import loading_device
from lit_gpt.train import TrainArgs, fit


def main(
    args: Flags[RunArgs] = RunArgs(out_dir=Path("out/lora/docstrings")),
    lora: LoRA = LoRA(r=8, alpha=16, dropout=0.0, query=True, value=True),
    quantize: Quantize | None = None,
    train: TrainArgs = TrainArgs(learning_rate=1e-3, warmup_steps=10, global_batch_size=16, epochs=1),
) -> None:
    """Fine-tune with LoRA.

    Args:
        args: The flags of every recipe, such as --checkpoint_dir and --data_dir; see lit_gpt/recipe.py.
        lora: The rank, and which matrices of which layers; see lit_gpt/lora.py.
        quantize: Keep the frozen linears in 4 or 8 bits (QLoRA); see lit_gpt/quantize.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
    """
    # settings: all of them, for hyperparameters.yaml
    settings = vars(args) | {"lora": lora, "quantize": quantize, "train": train}
    claim_out_dir(args.out_dir, args.resume, args.overwrite)

    # data: prepared for this model and its tokenizer
    tokenizer = Tokenizer(args.checkpoint_dir)
    config = Config.from_checkpoint(args.checkpoint_dir)
    train_data = Dataset(args.data_dir, "train")
    val_data = Dataset(args.data_dir, "val")
    train_data.check_fits(tokenizer, config)

    # device: from here on, one process for each
    fabric = start_processes(args)

    # build, quantize, load, adapt
    model = build_model(config)  # no weights yet
    quantize_linears(model, quantize)  # its linears will keep codes of what they are loaded with
    base = load_weights(model, args.checkpoint_dir, weight_dtype(args.precision), loading_device(fabric))
    apply_lora(model, lora)  # the chosen linears -> LoRALinear, in place; B is zero, so nothing has changed yet
    mark_only_lora_as_trainable(model)
    set_blocks(model, args)

    # what the run writes: hyperparameters.yaml now, `last` and `best` while it trains
    start_run(fabric, args.out_dir, settings)
    checkpoints = new_checkpoints("lora", lora, args, model, base, tokenizer, train_data)
    print_plan(fabric, checkpoints.method, settings, config, train_data)  # you may delete this

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
    report_run(fabric, log, args.out_dir, "LoRA", settings, before, after)


if __name__ == "__main__":
    run(main)
