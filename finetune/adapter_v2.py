"""Fine-tune with LLaMA-Adapter v2: prompts, norms, and a bias and a scale of every linear.

python finetune/adapter_v2.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/adapter_v2.py --adapter.prompt_length 20 --adapter.start_layer 4
python finetune/adapter_v2.py --quantize bnb.nf4
"""

from pathlib import Path

from lit_gpt.adapter import Adapter, apply_adapter_v2, mark_only_adapter_v2_as_trainable
from lit_gpt.checkpoint import build_model, load_weights
from lit_gpt.cli import run
from lit_gpt.quantize import Quantize, quantize_linears
from lit_gpt.recipe import Shared, begin, finetune
from lit_gpt.train import TrainArgs


def main(
    out_dir: Path = Path("out/adapter_v2/docstrings"),
    adapter: Adapter = Adapter(prompt_length=10, start_layer=2),
    quantize: Quantize | None = None,
    train: TrainArgs = TrainArgs(learning_rate=5e-3, weight_decay=0.02, global_batch_size=16, epochs=1),
    **shared: Shared,
) -> None:
    """Fine-tune with LLaMA-Adapter v2.

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
    apply_adapter_v2(model, adapter)  # gates and biases are zero, scales one: nothing has changed yet
    mark_only_adapter_v2_as_trainable(model)

    finetune(this, model, train, "adapter_v2", adapter, base)


if __name__ == "__main__":
    run(main)
