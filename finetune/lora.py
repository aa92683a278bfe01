"""Fine-tune with LoRA; with QLoRA where the base is quantized.

python finetune/lora.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/lora.py --lora.r 16 --lora.mlp true --train.learning_rate 2e-4
python finetune/lora.py --config finetune/recipes/quickstart.yaml
python finetune/lora.py --quantize bnb.nf4
python finetune/lora.py --devices 2
"""

from pathlib import Path

from lit_gpt.checkpoint import build_model, load_weights
from lit_gpt.cli import run
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.quantize import Quantize, quantize_linears
from lit_gpt.recipe import Shared, begin, finetune
from lit_gpt.train import TrainArgs


def main(
    out_dir: Path = Path("out/lora/docstrings"),
    lora: LoRA = LoRA(r=8, alpha=16, dropout=0.0, query=True, value=True),
    quantize: Quantize | None = None,
    train: TrainArgs = TrainArgs(learning_rate=1e-3, warmup_steps=10, global_batch_size=16, epochs=1),
    **shared: Shared,
) -> None:
    """Fine-tune with LoRA.

    Args:
        out_dir: Where the LoRA weights, the settings and the report of this run go.
        lora: The rank, and which matrices of which layers; see lit_gpt/lora.py.
        quantize: Keep the frozen linears in 4 or 8 bits (QLoRA); see lit_gpt/quantize.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
        shared: The flags of every recipe: --checkpoint_dir, --data_dir, --precision ...; see lit_gpt/recipe.py.
    """
    this = begin(locals())  # finds what is wrong before a weight is read, and starts the processes

    model = build_model(this.config)  # no weights yet
    quantize_linears(model, quantize)  # its linears will keep codes of what they are loaded with
    base = load_weights(model, *this.source)
    apply_lora(model, lora)  # the chosen linears -> LoRALinear, in place; B is zero, so nothing has changed yet
    mark_only_lora_as_trainable(model)

    finetune(this, model, train, "lora", lora, base)


if __name__ == "__main__":
    run(main)
