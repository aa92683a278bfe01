"""Fine-tune with LLaMA-Adapter: a few vectors that the upper blocks attend to besides the text.

python finetune/adapter.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/adapter.py --adapter.prompt_length 20 --adapter.start_layer 4
python finetune/adapter.py --quantize bnb.nf4
"""

from pathlib import Path

from lit_gpt.adapter import Adapter
from lit_gpt.adapter_recipe import finetune_adapter
from lit_gpt.cli import Flags, run
from lit_gpt.memory.plan import print_plan
from lit_gpt.quantize import Quantize
from lit_gpt.recipe import RunArgs
from lit_gpt.runs.methods import METHODS
from lit_gpt.train import TrainArgs


def main(
    args: Flags[RunArgs] = RunArgs(out_dir=Path("out/adapter/docstrings")),
    adapter: Adapter = Adapter(prompt_length=10, start_layer=2),
    quantize: Quantize | None = None,
    stream_blocks: bool = False,
    train: TrainArgs = TrainArgs(learning_rate=1e-2, weight_decay=0.02, global_batch_size=16, epochs=1),
) -> None:
    """Fine-tune with LLaMA-Adapter.

    Args:
        args: Each of its fields is a flag, as in every recipe: --checkpoint_dir, --data_dir ...; see lit_gpt/recipe.py.
        adapter: How many vectors, and from which block on; see lit_gpt/adapter.py.
        quantize: Keep the frozen linears in 4 or 8 bits; see lit_gpt/quantize.py.
        stream_blocks: Keep the frozen weights of the blocks in the host's memory, and copy the next block to the device
            while one computes: much less of its memory. Every block is computed again in backward. The result stays
            the same; see lit_gpt/stream_blocks.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
    """
    # the acts are those of finetune/lora.py; what is adapted, and how, is `METHODS["adapter"].apply`
    finetune_adapter(METHODS["adapter"], args, adapter, quantize, stream_blocks, train, show_plan=print_plan)


if __name__ == "__main__":
    run(main)
