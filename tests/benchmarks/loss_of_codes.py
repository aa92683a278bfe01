"""What `--quantize cpu.int8` and `cpu.int4` cost in quality: the loss of expected answers, and the likeliest tokens.

    python tests/benchmarks/loss_of_codes.py

It reads each validation record with the model as it was loaded for answers, in float32 and with either code.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F
from worker import HERE, print_table

from lit_gpt import GPT
from lit_gpt.data.dataset import Dataset
from lit_gpt.runs.load_finetuned import QuantizeForUse, UseArgs, load_model_for_use

KINDS: tuple[QuantizeForUse, ...] = ("none", "cpu.int8", "cpu.int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = HERE.parents[1] / "checkpoints/sample/SmolLM2-135M-Instruct-Q4_1"
    parser.add_argument("--checkpoint_dir", type=Path, default=sample)
    parser.add_argument("--data_dir", type=Path, default=HERE.parents[1] / "data/docstrings")
    parser.add_argument("--n_records", type=int, default=40)
    args = parser.parse_args()
    data = Dataset(args.data_dir, "val")

    rows = [["", "tokens", "loss", "more than float32", "same likeliest token"]]
    results = []
    for kind in KINDS:
        use = UseArgs(checkpoint_dir=args.checkpoint_dir, precision="32-true", quantize=kind)
        results.append(read_answers(load_model_for_use(use, torch.device("cpu")), data, args.n_records))
        (reference, reference_tokens), (losses, tokens) = results[0], results[-1]
        more = losses - reference
        error = more.std() / len(more) ** 0.5  # of the mean
        same = (tokens == reference_tokens).float().mean()
        rows.append(
            [kind, f"{len(losses)}", f"{losses.mean():.4f}", f"{more.mean():+.4f} ± {error:.4f}", f"{same:.1%}"]
        )
    print_table(rows)


@torch.inference_mode()
def read_answers(model: GPT, data: Dataset, n_records: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token of the expected answers (N,), and the token that the model finds likeliest there (N,)."""
    losses = []
    likeliest = []
    for i in range(min(n_records, len(data))):
        prompt, expected = data.question(i)
        idx = torch.cat((prompt, expected)).long()[None]
        logits = model(idx)[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, expected.long(), reduction="none"))
        likeliest.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(likeliest)


if __name__ == "__main__":
    main()
