"""Fine-tune a classifier, on texts and labels of a file or data set.

python scripts/download_spam.py
python finetune/classifier.py --data_path data/spam.csv
python finetune/classifier.py --data_path data/spam.csv --method lora --out_dir out/classifier/spam-lora
python finetune/classifier.py --data_path data/spam.csv --sweep true --out_dir out/classifier/spam-sweep
python finetune/classifier.py --data_path data/spam.csv --labels_curve '[8, 64, 512]' --out_dir out/classifier/spam-few
"""

from functools import partial
from pathlib import Path

from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.classifier.features import require_scikit_learn
from lit_gpt.classifier.grid import check_enough_texts
from lit_gpt.classifier.head import ClassifierArgs, resolve_quantize
from lit_gpt.classifier.labels_curve import check_enough_labels, check_labels_curve, run_labels_curve
from lit_gpt.classifier.report import write_classifier_report
from lit_gpt.classifier.sweep import check_seeds, run_sweep, steps_of
from lit_gpt.classifier.texts import TextArgs, load_texts
from lit_gpt.classifier.training import ClassifierTrainArgs, train_classifier
from lit_gpt.classifier.word_baseline import can_count_words, word_baseline
from lit_gpt.cli import Flags, command, run
from lit_gpt.data.embedding_rows import check_texts
from lit_gpt.lora import LoRA
from lit_gpt.quantize import Quantize
from lit_gpt.recipe import LaunchArgs, start_processes
from lit_gpt.runs.out_dir import claim_out_dir, start_run
from lit_gpt.sharding import is_sharded


def main(
    source: Flags[TextArgs],
    args: Flags[LaunchArgs] = LaunchArgs(out_dir=Path("out/classifier")),
    classifier: Flags[ClassifierArgs] = ClassifierArgs(),
    lora: LoRA = LoRA(r=8, alpha=16),
    quantize: Quantize | None = None,
    train: ClassifierTrainArgs = ClassifierTrainArgs(warmup_steps=10, global_batch_size=16, epochs=3),
    sweep: bool = False,
    labels_curve: list[int] | None = None,
    sweep_seeds: int = 3,
) -> None:
    """Fine-tune a classifier.

    Args:
        source: The texts and labels: --data_path, --text_key ...; see lit_gpt/classifier/texts.py.
        args: The flags of every recipe, such as --checkpoint_dir and --out_dir; see lit_gpt/recipe.py.
        classifier: The part that is trained: --method, --pooling ...; see lit_gpt/classifier/head.py.
        lora: For the methods lora and qlora: the rank, and which matrices of which layers.
        quantize: For the method qlora: the 4 or 8 bits of the frozen linears, None is bnb.nf4; see
            lit_gpt/quantize.py.
        train: The optimizer, the batch and the intervals; see lit_gpt/train.py. The learning rate is the method's own,
            if none is named.
        sweep: Try everything between the output layer and all blocks, and draw what each gives and costs.
        labels_curve: Train with so many labelled texts each, such as [8, 64, 512], and draw accuracy over their number.
        sweep_seeds: How often a sweep or a curve trains everything, each time with other texts set aside.
    """
    # settings: all of them, for hyperparameters.yaml
    quantize = resolve_quantize(classifier, quantize, sweep)
    settings = vars(source) | vars(args) | vars(classifier)
    settings |= {"lora": lora, "quantize": quantize, "train": train}
    settings |= {"sweep": sweep, "labels_curve": labels_curve, "sweep_seeds": sweep_seeds}
    if sweep and labels_curve is not None:
        raise InputError("--sweep trains with all labels, and --labels_curve with few of them: choose one.")
    if labels_curve is not None:
        labels_curve = check_labels_curve(labels_curve, train)
    trains_many = sweep or labels_curve is not None
    if trains_many:
        check_seeds(sweep_seeds)
    claim_out_dir(args.out_dir, args.resume, args.overwrite, args.checkpoint_dir)
    if trains_many or classifier.method == "features":
        require_scikit_learn()

    # one classifier, whose learning rate is known now; or all those of a sweep or a curve, for each seed
    tokenizer = Tokenizer(args.checkpoint_dir)
    config = Config.from_checkpoint(args.checkpoint_dir)
    steps: dict[str, ClassifierArgs] = {classifier.method: classifier}
    if sweep:
        steps = steps_of(classifier, config.n_layer)
    else:
        settings["train"] = train = train.for_method(classifier, config)
    seeds = range(sweep_seeds) if trains_many else [args.seed]
    depths = {step.first_trained_block(config.n_layer) for step in steps.values()} - {0}

    # device: from here on, one process for each
    fabric = start_processes(
        args,
        trains_base=any(step.trains_base for step in steps.values()),
        optimizer_in_backward=train.optimizer_in_backward,
    )
    if fabric.world_size > 1 and (depths or labels_curve or is_sharded(fabric)):
        raise InputError(
            "Several devices train --method lora, qlora or full, with --strategy auto and no --sweep or --labels_curve."
        )

    # data: read now, so that only the first process says what it left out
    data = load_texts(source, tokenizer, config.block_size)
    check_texts(data.texts.inputs(), tokenizer, config)
    for seed in seeds:
        data.split(seed)  # a split that cannot be made raises here, before anything is written
    if trains_many:
        check_enough_texts(data, seeds)
    if labels_curve is not None:
        check_enough_labels(labels_curve, data, seeds)

    # what the run writes: hyperparameters.yaml now, `last` and `best` while it trains
    start_run(fabric, args.out_dir, settings)

    # build, quantize, load, adapt, train, score: read lit_gpt/classifier/training.py
    train_one = partial(
        train_classifier,
        fabric=fabric,
        config=config,
        tokenizer=tokenizer,
        data=data,
        depths=depths,
        args=args,
        lora=lora,
        quantize=quantize,
        train=train,
    )
    if sweep:
        run_sweep(train_one, steps, data, seeds, args.out_dir)
        return
    if labels_curve is not None:
        run_labels_curve(
            train_one,
            classifier=classifier,
            labels_curve=labels_curve,
            data=data,
            seeds=seeds,
            train=train,
            out_dir=args.out_dir,
        )
        return
    scores = train_one(classifier, args.seed, args.out_dir)

    # what words alone say of the same texts, and the report
    if fabric.is_global_zero:
        train_data, _, scored_data = data.split(args.seed)
        words = word_baseline(data, train_data.records, scored_data.records) if can_count_words() else None
        write_classifier_report(
            scores,
            words,
            names=data.labelled.names,
            labels=scored_data.labels,
            out_dir=args.out_dir,
            command=command(),
            settings=settings,
            scored=data.describe_scored(args.seed),
        )


if __name__ == "__main__":
    run(main)
