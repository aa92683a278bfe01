"""Records, and folders of prepared data, for several test files."""

from pathlib import Path
from types import ModuleType

from helpers.scripts import script as any_script
from lit_gpt import Config, Tokenizer
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.find_problems import DataReport, find_problems
from lit_gpt.data.prepare import DataArgs, prepare

BLOCK_SIZE = 200
CONFIG = {  # config.json of a model that is never built
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100_000,  # enough for every tokenizer
    "hidden_size": 8,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": BLOCK_SIZE,
}
QA = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(40)]


def prepared(records, checkpoint: Path, data_dir: Path, **args) -> tuple[Dataset, Dataset]:
    """The training and the validation records of a folder that is prepared with these arguments."""
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=data_dir, **args))
    return Dataset(data_dir, "train"), Dataset(data_dir, "val")


def stored(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    """Each record's tokens and marks."""
    spans = [dataset.span(i) for i in range(len(dataset))]
    return [(dataset.tokens[start:end].tolist(), dataset.trained[start:end].tolist()) for start, end in spans]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def script(name: str) -> ModuleType:
    return any_script(f"scripts/{name}.py")


def looked_at(checkpoint: Path, data_dir: Path) -> DataReport:
    return find_problems(data_dir, Tokenizer(checkpoint), Config.from_checkpoint(checkpoint))
