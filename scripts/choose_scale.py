"""How much of a LoRA or an adapter to use: gain on validation records against what is forgotten, at several scales.

    python scripts/choose_scale.py --finetuned out/lora/docstrings
    python scripts/choose_scale.py --finetuned out/lora/docstrings --max_forgetting 0.02
    python scripts/choose_scale.py --finetuned out/lora/docstrings --scales '[0.6, 0.7, 0.8, 0.9]' --limit 100

--scale of generate/base.py and scripts/merge_lora.py uses the one that is chosen. Nothing is trained: each scale takes
a validation, and what was interrupted begins anew.
"""

from pathlib import Path

from lit_gpt import Config, InputError
from lit_gpt.cli import command, run
from lit_gpt.data.dataset import Dataset
from lit_gpt.device import Precision, default_device, inference_dtype
from lit_gpt.display.words import counted
from lit_gpt.evaluation.choose_scale import (
    SCALES,
    Comparison,
    check_can_scale,
    check_scales,
    claim_folder,
    measure_scales,
    write_report,
)
from lit_gpt.evaluation.folder import data_of_run
from lit_gpt.evaluation.forgetting import general_records, read_general_text
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import load_finetuned, read_base, trained_tokenizer
from lit_gpt.runs.methods import METHODS
from lit_gpt.runs.side_by_side import model_names

MERGE = Path(__file__).with_name("merge_lora.py")
CHAT = Path(__file__).parents[1] / "generate/chat.py"


def main(
    finetuned: Path,
    checkpoint_dir: Path | None = None,
    data_dir: Path | None = None,
    out_dir: Path | None = None,
    scales: list[float] = list(SCALES),  # noqa: B006 # jsonargparse makes a copy
    max_forgetting: float | None = None,
    limit: int | None = None,
    general_text: Path | None = None,
    precision: Precision = "auto",
) -> None:
    """Compare how much of a LoRA or an adapter to use, and name the best.

    Args:
        finetuned: The out_dir of finetune/lora.py, adapter.py or adapter_v2.py (its best), or one folder of it. Or an
            adapter that peft saved.
        checkpoint_dir: The base, if it is no longer where it was in training.
        data_dir: Prepared data, whose validation records the loss is of. None is what it was trained on.
        out_dir: Where the table, the plot and the scores of each record go. None is out/scale/NAME.
        scales: Factors of the change. 0, the base, and 1, as trained, are always among them.
        max_forgetting: The most that the chosen one may have forgotten: KL(base || model) on the general text, in nats
            per token. None is no limit.
        limit: Measure the first so many validation records. None is all.
        general_text: A text that has nothing to do with the data, on which forgetting is measured. None is
            lit_gpt/evaluation/general_text.txt.
        precision: Dtype of the weights and of the arithmetic.
    """
    scales = check_scales(scales)
    check_range("--max_forgetting", max_forgetting, at_least=0)
    check_range("--limit", limit, at_least=2)

    # what can be refused before a weight is read
    header, base_dir = read_base(checkpoint_dir, finetuned)
    method = METHODS[header.method]
    check_can_scale(method, finetuned)
    config = Config.from_checkpoint(base_dir)
    tokenizer = trained_tokenizer(finetuned, base_dir)
    dataset = Dataset(data_dir or data_of_run([finetuned]), "val")
    dataset.check_can_train(tokenizer, config)
    if len(dataset) < 2:
        raise InputError(
            f"{dataset.data_dir} has {counted(len(dataset), 'validation record')}, expected two or more. Prepare the"
            " data with some: --val_fraction 0.1."
        )
    text = general_records(read_general_text(general_text), tokenizer, config.block_size)
    name = model_names([finetuned])[0].replace("/", "-")
    out_dir = out_dir or Path("out/scale") / name
    claim_folder(out_dir)

    # one model, at each scale
    model, _ = load_finetuned(checkpoint_dir, finetuned, inference_dtype(precision), default_device())
    measured = measure_scales(model, method, scales, dataset, limit, text)
    comparison = Comparison(measured, max_forgetting)

    # table, plot, and the command that uses the best
    flags = ["--finetuned", str(finetuned), "--scale", f"{comparison.best.scale:g}"]
    if checkpoint_dir is not None:
        flags += ["--checkpoint_dir", str(checkpoint_dir)]
    if method.name == "lora":
        flags += ["--out_dir", f"checkpoints/mine/{name}-scale-{comparison.best.scale:g}"]
        use = command(flags, MERGE)
    else:  # which cannot be merged
        use = command(flags, CHAT)
    print(write_report(out_dir, comparison, command(), use))
    print(f"\nReport: {out_dir / 'scales.md'}")


if __name__ == "__main__":
    run(main)
