"""Each process reads, keeps, asks and saves its own rows of a model: `pytest tests/test_sharding.py`, about 1 min

Two processes on the CPU stand for two GPUs. What they find is compared with one process.
"""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.families import CASES, COMMON, make, tokens
from helpers.methods import finetune
from helpers.runs import column, write_data
from helpers.shell import python, torchrun
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_gpt import Config, InputError
from lit_gpt.adapter import Adapter, apply_adapter_v2
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.distributed import launch
from lit_gpt.generate.decode import generate
from lit_gpt.lora import LoRA, apply_lora
from lit_gpt.quantize import quantize_linears
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.slices import save_slices
from lit_gpt.sharding import (
    computes_split,
    full_parameters,
    full_tensor,
    local_tensor,
    mesh_of,
    own_rows,
    split_among_devices,
)

# rows of 64 and 128 inputs are whole blocks of codes; those of 48, as in all other cases, are not
BLOCKS = COMMON | dict(hidden_size=128, intermediate_size=192, num_attention_heads=4)
FAMILIES = {  # how the files keep the weights
    "plain": ("Llama", BLOCKS),
    "odd": ("Llama", COMMON | dict(vocab_size=95, intermediate_size=65)),
    "tied": ("Llama", BLOCKS | dict(tie_word_embeddings=True)),
    "stacked": CASES["phi3"],
    "grouped": CASES["gpt_neox"],
    "transposed": CASES["gpt2"],
    "experts": CASES["mixtral"],
}
KINDS = (None, "bnb.nf4", "bnb.nf4-dq", "bnb.int8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A checkpoint of each of FAMILIES; and one with a value that is not finite in the second half of its rows."""
    parent = tmp_path_factory.mktemp("families")
    for name, (kind, settings) in FAMILIES.items():
        make(parent / name, kind, settings)
    broken = make(parent / "broken", *FAMILIES["plain"])
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    return parent


# ---- in each of two processes


def one_of_two(folders: Path, out_dir: Path) -> None:
    fabric = launch(1, "32-true", strategy="fsdp")
    found = {}
    for name in FAMILIES:
        for kind in KINDS:
            if kind and kind != "bnb.int8" and name == "odd":
                continue  # rows of 65 inputs cannot be packed in pairs
            found[f"{name} {kind}"] = read(folders / name, kind, fabric)
    found["adapted"] = {name: adapted(name, folders, fabric) for name in ADAPTED}
    try:
        load_weights(build_model(Config.from_checkpoint(folders / "broken")), folders / "broken", mesh=mesh_of(fabric))
        found["broken"] = ""
    except InputError as error:
        found["broken"] = str(error)
    torch.save(found, out_dir / f"{fabric.global_rank}.pt")


def read(folder: Path, kind: Any, fabric: Any) -> dict[str, Any]:
    """The weights that two processes have read, put together, and the share of the matrices that this one holds."""
    model = build_model(Config.from_checkpoint(folder))
    quantize_linears(model, kind)
    fingerprint = load_weights(model, folder, torch.bfloat16, fabric.device, mesh_of(fabric))
    matrices = [param for param in model.parameters() if param.ndim == 2]
    halves = [abs(2 * len(local_tensor(param)) - len(param)) <= 1 for param in matrices]
    whole = {name: full_tensor(param).clone() for name, param in model.named_parameters()}
    split_among_devices(fabric, model)
    after = dict(full_parameters(model, lambda name, param: True))
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.items()), "splitting has moved a weight"
    is_tied = model.lm_head.weight is model.transformer.wte.weight
    return {"weights": whole, "halves": halves, "fingerprint": fingerprint, "tied": is_tied}


ADAPTED = {"lora": None, "dora": None, "dora nf4-dq": "bnb.nf4-dq", "adapter_v2": None}


def adapted(name: str, folders: Path, fabric: Any = None) -> torch.Tensor:
    """The logits of a model that is changed after it was read, and the tokens that it says."""
    model = build_model(Config.from_checkpoint(folders / "tied"))
    quantize_linears(model, ADAPTED[name])
    mesh = None if fabric is None else mesh_of(fabric)
    load_weights(model, folders / "tied", torch.float32, torch.device("cpu"), mesh)
    torch.manual_seed(0)
    if name == "adapter_v2":
        apply_adapter_v2(model, Adapter(prompt_length=3, start_layer=0))
    else:
        apply_lora(model, LoRA(dora=name.startswith("dora"), head=True))
    for key, param in model.named_parameters():
        if key.endswith(("lora_B", "adapter_gate")):
            param.data += 0.1 * torch.randn_like(param)
    if fabric is not None:
        split_among_devices(fabric, model)
        assert computes_split(model)
    with torch.no_grad():
        logits = model.eval()(tokens(1, 20))
    said = generate(model, tokens(9), 30, temperature=0.0)
    sampled = generate(model, tokens(9), 30, temperature=1.0, generator=torch.Generator().manual_seed(3))
    return torch.cat((logits.flatten(), said, sampled))


# ---- against one process


@pytest.fixture(scope="module")
def two(tmp_path_factory, folders) -> list[dict[str, Any]]:
    out_dir = tmp_path_factory.mktemp("two")
    torchrun(__file__, folders, out_dir)
    return [torch.load(out_dir / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_read_what_one_reads(name, kind, two, folders) -> None:
    """Bit for bit, codes and scales too, and each keeps half of the rows."""
    if f"{name} {kind}" not in two[0]:
        pytest.skip("rows of an odd length cannot be packed in pairs")
    model = build_model(Config.from_checkpoint(folders / name))
    quantize_linears(model, kind)
    fingerprint = load_weights(model, folders / name, torch.bfloat16)
    expected = dict(model.named_parameters())
    for rank in two:
        found = rank[f"{name} {kind}"]
        assert found["weights"].keys() == expected.keys() and found["fingerprint"] == fingerprint
        different = [key for key, tensor in found["weights"].items() if not torch.equal(tensor, expected[key])]
        assert different == []
        assert found["tied"] == (model.lm_head.weight is model.transformer.wte.weight)
        assert all(found["halves"]), "matrices that are not split"


@pytest.mark.parametrize("name", ADAPTED)
def test_two_processes_compute_and_say_what_one_does(name, two, folders) -> None:
    expected = adapted(name, folders)
    for rank in two:
        assert torch.equal(rank["adapted"][name], expected)


def test_each_process_checks_its_own_rows(two) -> None:
    assert two[0]["broken"] == ""
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinite values" in two[1]["broken"]


@pytest.mark.parametrize("n_rows", [0, 1, 2, 5, 7, 8, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_rows_are_those_of_torch(n_rows, size) -> None:
    """`fully_shard` and DTensor go by torch.chunk."""

    class Mesh:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def size(self) -> int:
            return size

        def get_local_rank(self) -> int:
            return self.rank

    rows = torch.arange(n_rows)
    chunks = [*rows.chunk(size), *[rows[:0]] * size]
    for rank in range(size):
        assert torch.equal(rows[own_rows(n_rows, Mesh(rank))], chunks[rank])


def test_no_process_holds_more_than_its_share(sample_dir, tmp_path) -> None:
    """Half of the model and one tensor, as Linux counts it; the whole sample would be twice as much."""
    script = ROOT / "tests/benchmarks/sharded_loading.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script]
    settings = ["--checkpoint_dir", sample_dir, "--runs", "qlora nf4-dq", "--worker", tmp_path]
    subprocess.run([*map(str, [*command, *settings])], check=True)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["kept"] < found["held"] < found["kept"] + found["largest"], found


# ---- whole runs


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


def flags(tiny_dir: Path, data_dir: Path, out_dir: Path, *others: Any) -> list[Any]:
    where = ["--checkpoint_dir", tiny_dir, "--data_dir", data_dir, "--out_dir", out_dir, "--precision", "32-true"]
    train = ["--train.learning_rate", 0.02, "--train.global_batch_size", 4, "--train.micro_batch_size", 4]
    steps = ["--train.max_steps", 4, "--train.warmup_steps", 1, "--train.eval_interval", 2, "--train.save_interval", 2]
    return [*where, *train, *steps, "--devices", 2, "--strategy", "fsdp", *others]


def ask_one_and_two(run: Path) -> None:
    """The same question to what a run has trained, by one process and by two that split the model."""
    ask = ["--finetuned", run, "--prompt", "What is it?", "--precision", "32-true", "--max_new_tokens", 12]
    one = python(ROOT / "generate/base.py", *ask, check=True)
    two = torchrun(ROOT / "generate/base.py", *ask)
    assert one.stdout == two.stdout != "" and two.stderr.count("Loaded in") == 1


def test_a_split_model_answers(tiny_dir, data_dir, tmp_path) -> None:
    """In the report, before and after, and while it trains; and to a prompt, by what was trained."""
    finetune("lora nf4", tiny_dir, data_dir, tmp_path / "one", n_answers=2)
    qlora = ["--quantize", "bnb.nf4", "--lora.mlp", "true"]
    result = python(ROOT / "finetune/lora.py", *flags(tiny_dir, data_dir, tmp_path / "two", "--n_answers", 2, *qlora))
    assert result.returncode == 0, result.stderr
    assert column(tmp_path / "one", "loss") == pytest.approx(column(tmp_path / "two", "loss"), rel=1e-5)
    assert result.stderr.count("Answering 2 validation records") == 2, "one process speaks for both"
    reports = [(tmp_path / run / "report.md").read_text() for run in ("one", "two")]
    said = [re.findall("<td.*?</td>", report, re.DOTALL) for report in reports]
    assert len(said[0]) > 3
    assert said[0] == said[1]
    ask_one_and_two(tmp_path / "one")


def test_last_in_slices(tiny_dir, data_dir, tmp_path) -> None:
    """Each process writes its own rows. One process and then two go on from there, as if nobody had stopped."""
    finetune("full", tiny_dir, data_dir, tmp_path / "one")
    run = tmp_path / "run"
    soon = ["--train.max_hours", 1e-9]
    on_one = ["--devices", 1, "--strategy", "auto", "--save_slices", "null"]
    settings = [ROOT / "finetune/full.py", *flags(tiny_dir, data_dir, run, "--n_answers", 0, "--save_slices", "true")]
    torchrun(*settings, *soon)
    python(*settings, *soon, "--resume", *on_one, check=True)
    torchrun(*settings, "--resume")
    assert column(run, "loss") == pytest.approx(column(tmp_path / "one", "loss"), rel=1e-5)
    files = sorted(path.name for path in (run / "last/slices").iterdir())
    assert len(files) == 2 and not (run / "last/model.safetensors").exists()
    sizes = [path.stat().st_size for path in (run / "last/slices").iterdir()]
    assert max(sizes) < 1.1 * min(sizes)

    # what is handed on is whole
    AutoModelForCausalLM.from_pretrained(run / "best")
    ask_one_and_two(run)
    one, two = (load_finetuned(None, folder)[0].state_dict() for folder in (tmp_path / "one", run))
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=2e-3) for key in one)
    with pytest.raises(InputError, match="holds a run in slices.*those of best"):
        load_finetuned(None, run / "last")

    # damage is seen before anything is trained
    (run / "last/slices" / files[0]).unlink()
    result = python(*settings, "--resume")
    assert result.returncode == 2 and f"lacks {files[0]}" in result.stderr


def test_a_full_disk_is_named(tmp_path) -> None:
    """torch says it in an exception of its own, with the tracebacks of all processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_slices({"a": torch.ones(1_000)}, tmp_path / "slices")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "slices")


def test_slices_of_what_is_not_split_are_refused(tiny_dir, data_dir, tmp_path) -> None:
    with pytest.raises(InputError, match="--save_slices is for weights that are split"):
        finetune("full", tiny_dir, data_dir, tmp_path / "run", save_slices=True)


if __name__ == "__main__":
    one_of_two(*map(Path, sys.argv[1:]))
