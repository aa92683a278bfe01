"""Fine-tune a classifier, on texts and labels of a file or data set.

python scripts/download_spam.py
python finetune/classifier.py --data_path data/spam.csv
python finetune/classifier.py --data_path data/spam.csv --method lora --out_dir out/classifier/spam-lora
python finetune/classifier.py --data_path data/spam.csv --sweep true --out_dir out/classifier/spam-sweep
"""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.classifier.cached_states import cached_rows, start_at
from lit_gpt.classifier.features import check_scikit_learn, fit_logistic_regression
from lit_gpt.classifier.head import Classifier, ClassifierArgs, TrainedClassifier, class_weights, mark_trainable
from lit_gpt.classifier.load import CLASSIFIER
from lit_gpt.classifier.scores import Scores, evaluate, report
from lit_gpt.classifier.sweep import check_sweep, steps_of, sweep_steps
from lit_gpt.classifier.texts import TextArgs, Texts, encode, read_labelled, split
from lit_gpt.cli import Flags, command, run
from lit_gpt.device import weight_dtype
from lit_gpt.distributed import is_sharded, loading_device
from lit_gpt.lora import LoRA, apply_lora, lora_filter
from lit_gpt.quantize import Quantize, quantization, quantize_linears
from lit_gpt.recipe import LaunchArgs, set_blocks, start_processes
from lit_gpt.runs.finetuned import Finetuned, load_trained
from lit_gpt.runs.out_dir import claim_out_dir, start_run
from lit_gpt.runs.saves import Checkpoints
from lit_gpt.train import TrainArgs, fit


def main(
    source: Flags[TextArgs],
    args: Flags[LaunchArgs] = LaunchArgs(out_dir=Path("out/classifier")),
    classifier: Flags[ClassifierArgs] = ClassifierArgs(),
    lora: LoRA = LoRA(r=8, alpha=16, query=True, value=True),
    quantize: Quantize | None = None,
    train: TrainArgs = TrainArgs(learning_rate=3e-4, warmup_steps=10, global_batch_size=16, epochs=3),
    sweep: bool = False,
    sweep_seeds: int = 3,
) -> None:
    """Fine-tune a classifier.

    Args:
        source: The texts and labels: --data_path, --text_key ...; see lit_gpt/classifier/texts.py.
        args: The flags of every recipe, such as --checkpoint_dir and --out_dir; see lit_gpt/recipe.py.
        classifier: What is trained: --method, --pooling ...; see lit_gpt/classifier/head.py.
        lora: For the methods lora and qlora: the rank, and which matrices of which layers.
        quantize: For the method qlora: the 4 or 8 bits of the frozen linears, None is bnb.nf4; see
            lit_gpt/quantize.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
        sweep: Try everything between the output layer and all blocks, and draw accuracy against minutes.
        sweep_seeds: How often, each time with other texts for validation.
    """
    out_dir = args.out_dir
    if quantize is not None and (sweep or classifier.method != "qlora"):
        raise InputError("--quantize is for --method qlora, and nothing else here has a quantized base. Leave it out.")
    quantize = quantize or ("bnb.nf4" if classifier.method == "qlora" else None)
    settings = vars(source) | vars(args) | vars(classifier)
    settings |= {"lora": lora, "quantize": quantize, "train": train, "sweep": sweep, "sweep_seeds": sweep_seeds}
    claim_out_dir(out_dir, args.resume, args.overwrite)
    if sweep:
        check_sweep(sweep_seeds)
    if sweep or classifier.method == "features":
        check_scikit_learn()
    tokenizer, config = Tokenizer(args.checkpoint_dir), Config.from_checkpoint(args.checkpoint_dir)
    steps = steps_of(classifier, config.n_layer) if sweep else {classifier.method: classifier}
    depths = {step.first_trained_block(config.n_layer) for step in steps.values()} - {0}
    fabric = start_processes(args, trains_base=any(step.method in ("last_k", "full") for step in steps.values()))
    if fabric.world_size > 1 and (depths or is_sharded(fabric)):
        raise InputError("Several devices train --method lora, qlora or full, with --strategy auto and no --sweep.")
    data = read_labelled(source.data_path, source.text_key, source.label_key)
    limit = min(source.max_seq_length, config.block_size)
    ids = encode(data.texts, tokenizer, limit)
    texts = Texts(ids, data.labels, np.arange(len(ids)))
    sides, seeds = partial(split, data, source.val_fraction), range(sweep_seeds) if sweep else [args.seed]
    for seed in seeds:
        sides(seed)  # what is wrong with them is found before anything is written
    start_run(fabric, out_dir, settings)

    def train_one(classifier: ClassifierArgs, seed: int, folder: Path) -> Scores:
        """From the base model to a classifier in `folder`, and how good it is on the texts that were set aside."""
        since = time.perf_counter()
        gpt = build_model(config)
        quantize_linears(gpt, quantize if classifier.method == "qlora" else None)
        base = load_weights(gpt, args.checkpoint_dir, weight_dtype(args.precision), loading_device(fabric))
        if classifier.uses_lora:
            apply_lora(gpt, lora)
        train_data, val_data = (texts.choose(part) for part in sides(seed))
        weights = class_weights(train_data.labels, classifier.balanced)
        model = Classifier(gpt, len(data.names), classifier, weights)
        mark_trainable(model, classifier, lora_filter)

        seconds = 0.0
        if depth := classifier.first_trained_block(config.n_layer):  # nothing changes below it: computed once, and kept
            cache = out_dir / "hidden.safetensors"
            rows, seconds = cached_rows(cache, base, model, texts, depths, depth, train.micro_batch_size)
            start_at(model, depth, rows)
            train_data, val_data = (part.as_places(depth == config.n_layer) for part in (train_data, val_data))
            since = time.perf_counter()

        trained = TrainedClassifier(asdict(classifier), asdict(lora), data.names, limit)
        of = str(args.checkpoint_dir), base, tokenizer.fingerprint, "none", quantization(gpt)
        checkpoints = Checkpoints(folder, model, Finetuned("classifier", asdict(trained), *of), CLASSIFIER)
        if classifier.method == "features":
            fit_logistic_regression(model, train_data, train.micro_batch_size)
            checkpoints.save("best")
        else:
            set_blocks(gpt, args)
            fit(fabric, model, train_data, val_data, train, checkpoints, args.resume, optimizer_class=args.optimizer)
            load_trained(model, folder / "best", CLASSIFIER)
        seconds += time.perf_counter() - since
        return evaluate(model, val_data, train.micro_batch_size, seconds)

    if sweep:
        sweep_steps(train_one, steps, data, sides, seeds, out_dir)
    else:
        scores = train_one(classifier, args.seed, out_dir)
    if not sweep and fabric.is_global_zero:
        report(scores, data.names, out_dir, command(), settings)


if __name__ == "__main__":
    run(main)
