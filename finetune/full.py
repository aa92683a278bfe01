"""Fine-tune the weights themselves, all of them or some.

python finetune/full.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/full.py --train_only 4
python finetune/full.py --train_only '["transformer.h.2[0-9].mlp", transformer.ln_f]'
python finetune/full.py --precision bf16-mixed --activation_checkpointing block
"""

from pathlib import Path

from lit_gpt.checkpoint import build_model, load_weights
from lit_gpt.cli import run
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.recipe import Shared, begin, finetune
from lit_gpt.train import TrainArgs


def main(
    out_dir: Path = Path("out/full/docstrings"),
    train_only: int | list[str] | None = None,
    train: TrainArgs = TrainArgs(learning_rate=5e-5, warmup_steps=10, global_batch_size=16, epochs=1),
    **shared: Shared,
) -> None:
    """Fine-tune all weights, or some.

    Args:
        out_dir: Where the model, the settings and the report of this run go. Its best is a Hugging Face folder.
        train_only: None is everything; 4 the last four blocks, the final norm and the head; or patterns of parameters'
            names, '["transformer.h.2[0-9]", lm_head]'; see lit_gpt/full.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
        shared: The flags of every recipe: --checkpoint_dir, --data_dir, --precision ...; see lit_gpt/recipe.py.
    """
    this = begin(locals(), full=True)  # finds what is wrong before a weight is read, and starts the processes

    model = build_model(this.config)  # no weights yet
    base = load_weights(model, *this.source)
    mark_chosen_as_trainable(model, Full(train_only))

    finetune(this, model, train, "full", Full(train_only), base)


if __name__ == "__main__":
    run(main)
