"""Does a server serve what was trained? Compares it with the run's own model, and says in words what is wrong.

python scripts/check_server.py --finetuned out/lora/mine
python scripts/check_server.py --url http://127.0.0.1:8080 --finetuned out/lora/mine --n_records 20
python scripts/check_server.py --finetuned out/lora/mine || exit 1
"""

import sys
from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.data.dataset import Dataset
from lit_gpt.device import Precision, default_device
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import UseArgs
from lit_gpt.runs.side_by_side import model_names
from lit_gpt.studies.ask_server import choose_model, over_http
from lit_gpt.studies.server_check import judge
from lit_gpt.studies.server_evidence import Here, data_dir_of, gather


def main(
    finetuned: Path,
    url: str = "http://127.0.0.1:8000",
    model_name: str | None = None,
    checkpoint_dir: Path | None = None,
    data_dir: Path | None = None,
    n_records: int = 8,
    max_new_tokens: int = 40,
    precision: Precision = "auto",
    api_key: str | None = None,
    max_seconds: float = 120,
) -> None:
    """Ask a server about validation records, and say what is wrong. The exit status is 1 if something is.

    Args:
        finetuned: The folder that a fine-tuning script wrote: an out_dir (its best), or one folder of it.
        url: The server. It speaks OpenAI's API, as vLLM, llama.cpp, Ollama and generate/serve.py do.
        model_name: The model to ask, by its name there. None is the only one, or the one that is called as the run.
        checkpoint_dir: The base model. None is the one that the run was trained on.
        data_dir: The data whose validation records are asked. None is what the run was trained on.
        n_records: The number of validation records.
        max_new_tokens: The most tokens of an answer.
        precision: Dtype of the weights here, with which the server's are compared.
        api_key: The secret that the server wants.
        max_seconds: The longest time to wait for an answer.
    """
    check_range("--n_records", n_records, at_least=1)
    check_range("--max_new_tokens", max_new_tokens, at_least=1)
    check_range("--max_seconds", max_seconds, above=0)

    # the server, and then what it should serve
    ask = over_http(url, api_key, max_seconds)
    name, listed = choose_model(ask, model_name, model_names([finetuned])[0])
    data = Dataset(data_dir or data_dir_of(finetuned), "val")
    here = Here(UseArgs(checkpoint_dir, finetuned, precision=precision), default_device())

    # both side by side
    evidence = gather(ask, name, listed, here, data, n_records, max_new_tokens)
    findings = judge(evidence)
    for finding in findings:
        print(f"{'WRONG' if finding.is_wrong else 'normal'}: {finding.what}. {finding.text}")
    for thing in evidence.unknown:
        print(f"unknown: {thing}")
    if any(finding.is_wrong for finding in findings):
        sys.exit(1)
    print(f"{name} at {url} serves what {finetuned} has trained, as far as it shows.")


if __name__ == "__main__":
    run(main)
