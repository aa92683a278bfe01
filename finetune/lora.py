"""Fine-tune with LoRA; with QLoRA where the base is quantized.

python finetune/lora.py --checkpoint_dir checkpoints/sample/SmolLM2-135M-Instruct-Q4_1 --data_dir data/docstrings
python finetune/lora.py --lora.r 16 --lora.alpha 32 --train.learning_rate 2e-4
python finetune/lora.py --quantize bnb.nf4 --devices 2
"""

from pathlib import Path

from lit_gpt import GPT, Config, Tokenizer
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.cli import Flags, run
from lit_gpt.data.dataset import open_splits
from lit_gpt.device import weight_dtype
from lit_gpt.evaluation.forgetting_in_training import general_text_of
from lit_gpt.evaluation.validation_metric import validation_metric
from lit_gpt.generate.answers import answers
from lit_gpt.lora import LoRA, apply_lora, lora_learning_rate, mark_only_lora_as_trainable
from lit_gpt.memory.plan import print_plan
from lit_gpt.quantize import Quantize, quantize_linears
from lit_gpt.recipe import (
    RunArgs,
    check_streaming,
    new_checkpoints,
    number_of_answers,
    recompute_or_compile_blocks,
    start_processes,
)
from lit_gpt.runs.methods import METHODS
from lit_gpt.runs.out_dir import claim_out_dir, start_run
from lit_gpt.runs.report import report_run
from lit_gpt.runs.saves import Checkpoints
from lit_gpt.sharding import mesh_of, split_among_devices
from lit_gpt.train import TrainArgs, check_run, fit


def main(
    args: Flags[RunArgs] = RunArgs(out_dir=Path("out/lora/docstrings")),
    lora: LoRA = LoRA(r=8, alpha=16, dropout=0.0),
    quantize: Quantize | None = None,
    stream_blocks: bool = False,
    train: TrainArgs = TrainArgs(learning_rate=None, warmup_steps=10, global_batch_size=16, epochs=1),
) -> None:
    """Fine-tune with LoRA.

    Args:
        args: Each of its fields is a flag, as in every recipe: --checkpoint_dir, --data_dir ...; see lit_gpt/recipe.py.
        lora: The rank, and which matrices of which layers, by default all linears of all blocks; see lit_gpt/lora.py.
        quantize: Keep the frozen linears in 4 or 8 bits (QLoRA); see lit_gpt/quantize.py.
        stream_blocks: Keep the frozen weights of the blocks in the host's memory, and copy the next block to the device
            while one computes: much less of its memory. Every block is computed again in backward. The result stays
            the same; see lit_gpt/stream_blocks.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py. Without a learning rate it is 2e-3 for
            the sample model, and less for wider ones; see lit_gpt/lora.py.
    """
    # the model's shape, on which the learning rate depends, unless --train.learning_rate names one
    config = Config.from_checkpoint(args.checkpoint_dir)
    train = train.or_learning_rate(lora_learning_rate(config.n_embd))

    # settings: all flags, for hyperparameters.yaml and the report
    settings = vars(args) | {"lora": lora, "quantize": quantize, "stream_blocks": stream_blocks, "train": train}
    if stream_blocks:
        check_streaming(args)  # it is for one device
    # refused if in use, or not empty and without a flag
    claim_out_dir(args.out_dir, args.resume, args.overwrite, args.checkpoint_dir)

    # data: prepared for this model and its tokenizer, and mapped into memory
    tokenizer = Tokenizer(args.checkpoint_dir)
    train_data, val_data = open_splits(args.data_dir, tokenizer, config)
    check_run(train_data, val_data, train)  # what the settings need of the data
    # what validations measure besides the loss: None, unless --train.metric or --train.watch_forgetting says so
    metric = validation_metric(train, tokenizer, val_data)
    general_text = general_text_of(train, tokenizer, config, METHODS["lora"])

    # devices: with --devices 2 two processes of this command are started here, and this one only waits for them. It is
    # Lightning's Fabric. A small trial step refuses an --optimizer that cannot work
    fabric = start_processes(args, optimizer_in_backward=train.optimizer_in_backward)

    # build, quantize, load, adapt. The fingerprint tells this base from others: what is trained fits no other
    model: GPT = build_model(config)  # no weights yet
    quantize_linears(model, quantize)  # if --quantize says so, linears will keep their weights in 4 or 8 bits
    dtype = weight_dtype(args.precision)
    base_fingerprint = load_weights(
        model, args.checkpoint_dir, dtype, fabric.device, mesh_of(fabric), blocks_on_host=stream_blocks
    )
    apply_lora(model, lora)  # the chosen linears -> LoRALinear, in place; B is zero, so nothing has changed yet
    mark_only_lora_as_trainable(model)
    # as --activation_checkpointing, --compile and --stream_blocks say
    recompute_or_compile_blocks(model, args, stream_to=fabric.device if stream_blocks else None)
    split_among_devices(fabric, model)  # with --strategy fsdp each device keeps a slice of every weight

    # out_dir: --overwrite sets the old run aside until this one has saved, --resume refuses other settings than its
    # own. Then hyperparameters.yaml is written. `fit` will save A and B to `best` and `last`, as lora.safetensors
    start_run(fabric, args.out_dir, settings)
    method = METHODS["lora"]  # a name and a filter, for saving: its tensors are those whose names begin with lora_
    checkpoints: Checkpoints = new_checkpoints(method, lora, args, model, base_fingerprint, tokenizer, train_data)
    print_plan(fabric, method, settings, config, train_data)  # a step's memory, worked out; you may delete this line

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
