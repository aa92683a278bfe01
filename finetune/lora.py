"""Fine-tune with LoRA.

python finetune/lora.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/lora.py --lora.r 16 --lora.mlp true --train.learning_rate 2e-4
python finetune/lora.py --config finetune/recipes/quickstart.yaml
python finetune/lora.py --devices 2
"""

from pathlib import Path

from lit_gpt import Config, Tokenizer
from lit_gpt.checkpoint import build_model, load_weights
from lit_gpt.cli import command, run
from lit_gpt.config import SAMPLE
from lit_gpt.data import Dataset
from lit_gpt.device import LoggerName, Precision, launch, weight_dtype
from lit_gpt.finetuned import Checkpoints, claim_out_dir, describe_run, load_trained, start_run
from lit_gpt.generate import answers
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.report import finish
from lit_gpt.train import TrainArgs, fit


def main(
    checkpoint_dir: Path = SAMPLE,
    data_dir: Path = Path("data/docstrings"),
    out_dir: Path = Path("out/lora/docstrings"),
    lora: LoRA = LoRA(r=8, alpha=16, dropout=0.0, query=True, value=True),
    train: TrainArgs = TrainArgs(
        learning_rate=1e-3,
        warmup_steps=10,
        weight_decay=0.01,
        max_norm=1.0,
        global_batch_size=16,
        micro_batch_size=16,
        epochs=1,
        eval_interval=50,
        save_interval=50,
    ),
    precision: Precision = "auto",
    devices: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    logger: LoggerName | None = None,
    n_answers: int = 5,
    seed: int = 1337,
) -> None:
    """Fine-tune with LoRA.

    Args:
        checkpoint_dir: The base model: a Hugging Face folder, or a converted copy of one.
        data_dir: What one of scripts/prepare_*.py wrote.
        out_dir: Where the LoRA weights, the settings and the report of this run go.
        lora: The rank, and which matrices of which layers; see lit_gpt/lora.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
        precision: Of the frozen weights and the arithmetic. What trains is always float32. auto is bf16-true on a GPU
            that has it, else 32-true.
        devices: GPUs, or processes where there is no GPU.
        resume: Continue the run in out_dir.
        overwrite: Replace the run in out_dir.
        logger: tensorboard or wandb, besides metrics.csv.
        n_answers: How many validation records to answer before and after, for the report.
        seed: Of the weights that start at random.
    """
    settings = locals()
    claim_out_dir(out_dir, resume, overwrite)
    tokenizer, config = Tokenizer(checkpoint_dir), Config.from_checkpoint(checkpoint_dir)
    train_data, val_data = Dataset(data_dir, "train"), Dataset(data_dir, "val")
    train_data.check_fits(tokenizer, config)
    fabric = launch(devices, precision, seed, logger, str(out_dir))

    model = build_model(config)  # no weights yet
    base = load_weights(model, checkpoint_dir, weight_dtype(precision), fabric.device)
    apply_lora(model, lora)  # the chosen linears -> LoRALinear, in place; B is zero, so nothing has changed yet
    mark_only_lora_as_trainable(model)

    description = describe_run("lora", lora, checkpoint_dir, base, tokenizer, train_data.meta["prompt_style"])
    if fabric.is_global_zero:
        start_run(out_dir, settings)  # only now that everything has been found in order
    before = answers(model, tokenizer, val_data, n_answers if fabric.is_global_zero else 0)
    log = fit(
        fabric,
        model,
        train_data,
        val_data,
        train,
        Checkpoints(out_dir, model, description),
        resume=resume,
        show_sample=lambda: answers(model, tokenizer, val_data, min(n_answers, 1)),
    )

    if fabric.is_global_zero:
        load_trained(model, out_dir / "best", "lora")  # what --finetuned will use
        after = answers(model, tokenizer, val_data, n_answers)
        finish(log, out_dir, "LoRA", command(), settings, before, after)


if __name__ == "__main__":
    run(main)
