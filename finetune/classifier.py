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
from typing import Annotated, Any

import numpy as np

from lit_gpt import Config, InputError, Tokenizer, classify
from lit_gpt.checkpoint import build_model, load_weights
from lit_gpt.classify import Classifier, ClassifierArgs, Scores, TextArgs, Texts, TrainedClassifier
from lit_gpt.cli import command, run
from lit_gpt.device import is_sharded, loading_device, weight_dtype
from lit_gpt.finetuned import Checkpoints, Finetuned, claim_out_dir, load_trained, start_run
from lit_gpt.lora import LoRA, apply_lora, lora_filter
from lit_gpt.quantize import Quantize, quantization, quantize_linears
from lit_gpt.recipe import LaunchArgs, chosen, set_blocks, start
from lit_gpt.sweep import check_sweep, steps_of, sweep_steps
from lit_gpt.train import TrainArgs, fit


def main(
    out_dir: Path = Path("out/classifier"),
    lora: LoRA = LoRA(r=8, alpha=16, query=True, value=True),
    quantize: Quantize | None = None,
    train: TrainArgs = TrainArgs(learning_rate=3e-4, warmup_steps=10, global_batch_size=16, epochs=3),
    sweep: bool = False,
    sweep_seeds: int = 3,
    **shared: Annotated[Any, LaunchArgs, ClassifierArgs, TextArgs],
) -> None:
    """Fine-tune a classifier.

    Args:
        out_dir: Where the trained weights, the settings and the report of this run go.
        lora: For the methods lora and qlora: the rank, and which matrices of which layers.
        quantize: For the method qlora: the 4 or 8 bits of the frozen linears, None is bnb.nf4; see
            lit_gpt/quantize.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py.
        sweep: Try everything between the output layer and all blocks, and draw accuracy against minutes.
        sweep_seeds: How often, each time with other texts for validation.
        shared: --method, --pooling ..., --data_path ... and --checkpoint_dir, --precision ...; see lit_gpt/classify.py
            and lit_gpt/recipe.py.
    """
    settings = {key: value for key, value in locals().items() if key != "shared"} | shared
    classifier, source = chosen(ClassifierArgs, shared), chosen(TextArgs, shared)
    args = chosen(LaunchArgs, shared | {"out_dir": out_dir})
    if quantize is not None and (sweep or classifier.method != "qlora"):
        raise InputError("--quantize is for --method qlora, and nothing else here has a quantized base. Leave it out.")
    quantize = quantize or ("bnb.nf4" if classifier.method == "qlora" else None)
    settings |= vars(args) | {"quantize": quantize}
    claim_out_dir(out_dir, args.resume, args.overwrite)
    if sweep:
        check_sweep(sweep_seeds)
    if sweep or classifier.method == "features":
        classify.check_scikit_learn()
    tokenizer, config = Tokenizer(args.checkpoint_dir), Config.from_checkpoint(args.checkpoint_dir)
    steps = steps_of(classifier, config.n_layer) if sweep else {classifier.method: classifier}
    depths = {step.first_trained_block(config.n_layer) for step in steps.values()} - {0}
    fabric = start(args, own_weights=any(step.method in ("last_k", "full") for step in steps.values()))
    if fabric.world_size > 1 and (depths or is_sharded(fabric)):
        raise InputError("Several devices train --method lora, qlora or full, with --strategy auto and no --sweep.")
    data = classify.read_labelled(source.data_path, source.text_key, source.label_key)
    limit = min(source.max_seq_length, config.block_size)
    ids = classify.encode(data.texts, tokenizer, limit)
    texts = Texts(ids, data.labels, np.arange(len(ids)))
    sides, seeds = partial(classify.split, data, source.val_fraction), range(sweep_seeds) if sweep else [args.seed]
    for seed in seeds:
        sides(seed)  # what is wrong with them is found before anything is written
    if fabric.is_global_zero:
        start_run(out_dir, settings)

    def train_one(classifier: ClassifierArgs, seed: int, folder: Path) -> Scores:
        """From the base model to a classifier in `folder`, and how good it is on the texts that were set aside."""
        since = time.perf_counter()
        gpt = build_model(config)
        quantize_linears(gpt, quantize if classifier.method == "qlora" else None)
        base = load_weights(gpt, args.checkpoint_dir, weight_dtype(args.precision), loading_device(fabric))
        if classifier.uses_lora:
            apply_lora(gpt, lora)
        train_data, val_data = (texts.choose(part) for part in sides(seed))
        weights = classify.class_weights(train_data.labels, classifier.balanced)
        model = Classifier(gpt, len(data.names), classifier, weights)
        classify.mark_trainable(model, classifier, lora_filter)

        seconds = 0.0
        if depth := classifier.first_trained_block(config.n_layer):  # nothing changes below it: computed once, and kept
            cache = out_dir / "hidden.safetensors"
            rows, seconds = classify.cached_rows(cache, base, model, texts, depths, depth, train.micro_batch_size)
            classify.start_at(model, depth, rows)
            train_data, val_data = (part.as_places(depth == config.n_layer) for part in (train_data, val_data))
            since = time.perf_counter()

        trained = TrainedClassifier(asdict(classifier), asdict(lora), data.names, limit)
        of = str(args.checkpoint_dir), base, tokenizer.fingerprint, "none", quantization(gpt)
        checkpoints = Checkpoints(folder, model, Finetuned("classifier", asdict(trained), *of))
        if classifier.method == "features":
            classify.fit_logistic_regression(model, train_data, train.micro_batch_size)
            checkpoints.save("best")
        else:
            set_blocks(gpt, args)
            fit(fabric, model, train_data, val_data, train, checkpoints, args.resume, optimizer_class=args.optimizer)
            load_trained(model, folder / "best", "classifier")
        seconds += time.perf_counter() - since
        return classify.evaluate(model, val_data, train.micro_batch_size, seconds)

    if sweep:
        sweep_steps(train_one, steps, data, sides, seeds, out_dir)
    else:
        scores = train_one(classifier, args.seed, out_dir)
    if not sweep and fabric.is_global_zero:
        classify.report(scores, data.names, out_dir, command(), settings)


if __name__ == "__main__":
    run(main)
