"""Fine-tune with LLaMA-Adapter: a few vectors that the upper blocks look at besides the text.

python finetune/adapter.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/adapter.py --adapter.prompt_length 20 --adapter.start_layer 4
python finetune/adapter.py --quantize bnb.nf4
"""

from pathlib import Path

from lit_gpt.adapter import Adapter, apply_adapter, mark_only_adapter_as_trainable
from lit_gpt.checkpoint import build_model, load_weights
from lit_gpt.cli import run
from lit_gpt.quantize import Quantize, quantize_linears
from lit_gpt.recipe import Shared, begin, finetune
from lit_gpt.train import TrainArgs


def main(
    out_dir: Path = Path("out/adapter/docstrings"),
    adapter: Adapter = Adapter(prompt_length=10, start_layer=2),
    quantize: Quantize | None = None,
    train: TrainArgs = TrainArgs(learning_rate=1e-2, weight_decay=0.02, global_batch_size=16, epochs=1),
    **shared: Shared,
) -> None:
    """Fine-tune with LLaMA-Adapter.

    Args:
        out_dir: Where the adapter, the settings and the report of this run go.
        adapter: How many vectors, and from which block on; see lit_gpt/adapter.py.
        quantize: Keep the frozen linears in 4 or 8 bits; see lit_gpt/quantize.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
        shared: The flags of every recipe: --checkpoint_dir, --data_dir, --precision ...; see lit_gpt/recipe.py.
    """
    this = begin(locals())  # finds what is wrong before a weight is read, and starts the processes

    model = build_model(this.config)  # no weights yet
    quantize_linears(model, quantize)
    base = load_weights(model, *this.source)
    apply_adapter(model, adapter)  # gates are zero, so nothing has changed yet
    mark_only_adapter_as_trainable(model)

    finetune(this, model, train, "adapter", adapter, base)


if __name__ == "__main__":
    run(main)
