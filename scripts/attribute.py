"""Which training records did it: what a fine-tuned model learned from which of them.

    python scripts/attribute.py --finetuned out/lora/docstrings
    python scripts/attribute.py --finetuned out/lora/docstrings --prompt "What is the module abc for?"
    python scripts/attribute.py --finetuned out/lora/docstrings --prompt "Who are you?" --answer "I am Ada."
    python scripts/attribute.py --finetuned out/lora/docstrings --select 0.2 --drop 0.03

Interrupted, the same command goes on.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from lit_gpt import Config, InputError
from lit_gpt.attribution.fit import losses_elsewhere, other_questions
from lit_gpt.attribution.gradients import RecordGradients, Sketch
from lit_gpt.attribution.influence import alike, influences
from lit_gpt.attribution.report import Attribution, write_attribution
from lit_gpt.attribution.store import GRADIENTS, GradientStore, claim_attribution, key_of
from lit_gpt.attribution.subset import most_helpful, without_most, write_subset
from lit_gpt.attribution.target import answer_record, given_answer, target_of, validation_records
from lit_gpt.cli import command, run
from lit_gpt.data.dataset import OTHER, open_splits
from lit_gpt.device import Precision, default_device, inference_dtype
from lit_gpt.display.progress import progress
from lit_gpt.evaluation.folder import data_of_run
from lit_gpt.evaluation.kept import Kept
from lit_gpt.files import must_be_empty
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import load_finetuned, read_base, trained_tokenizer
from lit_gpt.runs.resume import data_fingerprint
from lit_gpt.runs.side_by_side import model_names


def main(
    finetuned: Path,
    prompt: str | None = None,
    answer: str | None = None,
    checkpoint_dir: Path | None = None,
    data_dir: Path | None = None,
    out_dir: Path | None = None,
    n_records: int = 64,
    select: float | None = None,
    drop: float | None = None,
    drop_by: Literal["misfit", "influence"] = "misfit",
    n_questions: int = 2,
    n_shown: int = 10,
    sketch_size: int = 8192,
    micro_batch_size: int = 16,
    max_new_tokens: int = 60,
    precision: Precision = "auto",
) -> None:
    """Tell which training records made a loss of a model with LoRA lower, which made it higher, and which do the same.

    The first question about a run takes most of the time of an epoch, and stores a gradient of each training record in
    out_dir; further ones take seconds.

    Args:
        finetuned: The folder that finetune/lora.py wrote: an out_dir (its best), or one folder of it.
        prompt: Ask about the answer to this, in place of the loss on validation records.
        answer: The answer that is asked about, which the model need not give. None is the one that it gives.
        checkpoint_dir: The base model. None is the one that was fine-tuned.
        data_dir: The prepared data that it was trained on. None is what the run itself says.
        out_dir: Where the gradients and the report go. None is out/attribute/NAME, by the run's name.
        n_records: How many validation records to ask about: always the first ones.
        select: Write this share of the training records, the most helpful ones, to out_dir/selected: a folder of
            prepared data to train on.
        drop: Write the training records without this share of them, the most suspicious ones, to out_dir/rest.
        drop_by: Which are suspicious: misfit finds answers of other questions, influence wrong labels where there are
            few to choose from.
        n_questions: Behind how many other questions each answer is tried, to find those that do not belong to their
            own. The first asks nothing, the others are those of records. Each takes about a fifth of an epoch's time;
            0 leaves it out.
        n_shown: How many records of each kind to show.
        sketch_size: Numbers that are kept of a gradient. More are more exact.
        micro_batch_size: Records whose gradients are made at once. Lower it when memory runs out.
        max_new_tokens: The longest answer that the model gives, in tokens.
        precision: Dtype of the weights and of the arithmetic.
    """
    for name, share in (("select", select), ("drop", drop)):
        check_range(f"--{name}", share, above=0, below=1)
    check_range("--n_questions", n_questions, at_least=0)
    counts = dict(
        n_records=n_records,
        n_shown=n_shown,
        sketch_size=sketch_size,
        micro_batch_size=micro_batch_size,
        max_new_tokens=max_new_tokens,
    )
    for name, count in counts.items():
        check_range(f"--{name}", count, at_least=1)
    if answer is not None and prompt is None:
        raise InputError("--answer says what to ask about, and not what it answers. Name a --prompt, too.")

    # the run and its data, before a weight is read
    header, base_dir = read_base(checkpoint_dir, finetuned)
    if header.method != "lora":
        raise InputError(f"{finetuned} was trained with {header.method}, expected lora: finetune/lora.py writes it.")
    tokenizer = trained_tokenizer(finetuned, base_dir)
    data_dir = data_dir or data_of_run([finetuned])
    config = Config.from_checkpoint(base_dir)
    train_data, val_data = open_splits(data_dir, tokenizer, config)
    if prompt is None:
        asked = validation_records(val_data, n_records)
    style = train_data.meta["prompt_style"]
    has_answers = OTHER not in train_data.trained  # prompts and texts that are trained are in the losses
    if drop is not None and drop_by == "misfit" and not (n_questions and has_answers):
        what = "these data have prompts or texts that are trained" if n_questions else "--n_questions is 0"
        raise InputError(
            f"--drop leaves out what has a large misfit, and there is none: {what}. Add --drop_by influence."
        )

    # the folder, which may hold the gradients already
    out_dir = out_dir or Path("out/attribute") / model_names([finetuned])[0].replace("/", "-")
    claim_attribution(out_dir)
    folders = {"selected": select, "rest": drop}
    for name, share in folders.items():
        if share is not None:
            must_be_empty(out_dir / name)

    # the model, and a gradient of each training record
    dtype = inference_dtype(precision)
    model, header = load_finetuned(checkpoint_dir, finetuned, dtype=dtype, device=default_device())
    source = RecordGradients(model, Sketch(sketch_size))
    if prompt is not None:
        answer = answer or given_answer(model, tokenizer, style, prompt, max_new_tokens)
        asked = [answer_record(tokenizer, style, prompt, answer, config.block_size)]
    key = key_of(source.linears, header.base, str(header.quantize), str(dtype), data_fingerprint(train_data))
    store = GradientStore(out_dir / GRADIENTS, key, len(train_data), sketch_size)
    missing = store.fill(train_data, source, micro_batch_size)
    for _ in progress(missing, len(train_data), "gradients of training records", store.n_done):
        pass

    # what is asked about, and who did it
    what = f"The first {len(asked)} validation records" if prompt is None else f"The answer {answer!r} to {prompt!r}"
    target = target_of(asked, source, micro_batch_size, what)
    (influence,) = influences(store.gradients, target.gradient.numpy()[None])
    n_targets = np.array([train_data.n_targets(i) for i in range(len(train_data))])
    misfit = None
    if n_questions and has_answers:
        kept = Kept(store.folder / f"elsewhere-{key[:16]}.jsonl")
        questions = other_questions(train_data, tokenizer, n_questions)
        misfit = store.losses / losses_elsewhere(model, train_data, questions, kept)
    pairs = alike(store.gradients, least=0.8, most=1000)
    found = Attribution(target.what, target.loss, influence, store.losses / n_targets, misfit, pairs)

    # the report, and data to train on
    findings = write_attribution(out_dir, found, train_data, tokenizer, command(), n_shown)
    print(f"{findings}\n\nReport: {out_dir / 'report.md'}")
    if select is not None:
        chosen = most_helpful(influence, select)
        write_subset(train_data, chosen, out_dir / "selected", f"the most helpful {select:g} of {data_dir}")
        print(f"Data: {out_dir / 'selected'}, {len(chosen):,} training records")
    if drop is not None:
        suspicion = misfit if drop_by == "misfit" and misfit is not None else -influence
        chosen = without_most(suspicion, drop)
        write_subset(train_data, chosen, out_dir / "rest", f"{data_dir} without the worst {drop:g} by {drop_by}")
        print(f"Data: {out_dir / 'rest'}, {len(chosen):,} training records")


if __name__ == "__main__":
    run(main)
