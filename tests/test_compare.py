"""scripts/compare_methods.py on a tiny model: `pytest tests/test_compare.py`, about 1 min"""

import json
import re
import runpy
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_tiny
from helpers.runs import write_data
from helpers.shell import python

from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.checkpoint.load import build_model, load_model
from lit_gpt.cli import parse
from lit_gpt.data.dataset import Dataset
from lit_gpt.evaluation.forgetting import forgetting, general_records, read_general_text, remember_base
from lit_gpt.memory.plan import adapt, setup_of_script
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.log import HEADER, read_metrics
from lit_gpt.scores.paired import paired_difference
from lit_gpt.scores.record_scores import read_scores
from lit_gpt.studies.compare_methods import (
    CANDIDATES,
    FROZEN_SHARE,
    Budget,
    check_comparison,
    loss_before,
    steps_for,
    steps_that_fit,
    stored_budget,
    write_budget,
)

LORA, QLORA = "LoRA, r 8, query and value", "QLoRA, r 8, query and value"
FOUR = ["full", LORA, QLORA, "adapter"]
RATE = ("--train.learning_rate", "0.01", "--train.share_prefixes")  # flags of the scripts that are compared


def compare(folder: Path, *words: Any, **flags: Any) -> subprocess.CompletedProcess:
    flags = {"checkpoint_dir": folder / "base", "data_dir": folder / "data", "out_dir": folder / "out"} | flags
    parts = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
    return python(ROOT / "scripts/compare_methods.py", *words, *parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sample_dir) -> Path:
    """A comparison of four methods. Its model has enough blocks for all."""
    folder = tmp_path_factory.mktemp("compare")
    make_tiny(folder / "base", sample_dir, num_hidden_layers=5)
    write_data(folder / "data", folder / "base")
    result = compare(folder, *RATE, steps=4, methods=json.dumps(FOUR))
    assert result.returncode == 0, result.stderr
    assert (folder / "out/compare.md").read_text() in result.stdout
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


def outcomes(folder: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in (folder / "out").glob("*/outcome.json")]
    return {outcome["method"]: outcome for outcome in found}


def test_methods_stand_side_by_side(folder) -> None:
    """On the same tokens; the figures are those of the models."""
    found, table = outcomes(folder), (folder / "out/compare.md").read_text()
    assert found.keys() == {*FOUR} and all(f"| {name} |" in table for name in FOUR)
    rows = [read_metrics(path) for path in (folder / "out").glob("*/metrics.csv")]
    assert len({tuple(row["tokens"] for row in run) for run in rows}) == 1 and len(rows) == 4
    model = load_model(folder / "base")
    assert found["full"]["trained"] == sum(param.numel() for param in model.parameters())
    assert found[LORA]["trained"] == found[QLORA]["trained"] == 5 * 8 * (48 + 48 + 48 + 16)
    assert found["adapter"]["trained"] == 3 * (10 * 48 + 6)
    records = general_records(read_general_text(), Tokenizer(folder / "base"), model.config.block_size)
    base = remember_base(model, records)
    tuned, _ = load_finetuned(None, folder / "out/full/best")  # the validation after the last step is the best
    measured = forgetting(tuned, base, records)
    gap = measured.loss.mean - forgetting(model, base, records).loss.mean
    assert found["full"]["forgotten"] == pytest.approx(gap, rel=1e-6) and gap != 0
    assert found["full"]["kl"] == pytest.approx(measured.kl.mean, rel=1e-6) and measured.kl.mean > 0
    # each against the best, record by record
    ranked = sorted(FOUR, key=lambda name: found[name]["val_loss"])
    of_row = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    assert "| the best |" in of_row[ranked[0]]
    assert all(re.search(r"it is worse by|no difference", of_row[name]) for name in ranked[1:])
    losses = [read_scores(folder / "out" / path / "val_losses.csv")[1] for path in ("full", "adapter")]
    gap = found["adapter"]["val_loss"] - found["full"]["val_loss"]
    assert paired_difference(*losses).mean == pytest.approx(gap, abs=1e-6) and gap != 0
    assert (folder / "out/compare.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_trained_is_kept_and_nothing_else(folder) -> None:
    for name in ("full", "LoRA-r-8-query-and-value", "QLoRA-r-8-query-and-value", "adapter"):
        assert (folder / "out" / name / "best").is_dir() and not (folder / "out" / name / "last").exists()
    assert len([path for path in (folder / "out").iterdir() if path.is_dir()]) == 4


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_method_says_what_it_is_whatever_the_defaults_are(name: str) -> None:
    main = runpy.run_path(str(ROOT / "finetune" / CANDIDATES[name].script))["main"]
    settings = parse(main, CANDIDATES[name].flags.split())
    if "LoRA" in name:
        others = "key", "projection", "mlp"
        lora = settings["lora"]
        assert [getattr(lora, other) for other in others] == [name.endswith("all linears")] * 3
        assert lora.query and lora.value and not lora.head and f"r {lora.r}," in name and lora.alpha == 2 * lora.r
        assert (settings["quantize"] == "bnb.nf4") == name.startswith("QLoRA")


def test_methods_train_as_much_as_their_names_say() -> None:
    config = Config.from_name("SmolLM2-135M")

    def trained(name: str) -> int:
        main = runpy.run_path(str(ROOT / "finetune" / CANDIDATES[name].script))["main"]
        settings = parse(main, CANDIDATES[name].flags.split())
        setup = setup_of_script(CANDIDATES[name].script.removesuffix(".py"), settings, config, tokens=1)
        return sum(param.numel() for param in adapt(build_model(config), setup).parameters() if param.requires_grad)

    full, last, lora, lora_all, lora_64, qlora, adapter, adapter_v2 = map(trained, CANDIDATES)
    block = sum(param.numel() for param in build_model(config).transformer.h[0].parameters())
    assert last == 4 * block + config.n_embd and full > last  # the last blocks, and the norm behind them
    assert qlora == lora and lora_64 == 8 * lora_all and lora_all > lora > adapter and adapter_v2 > adapter


def test_it_goes_on_where_it_stopped(folder, tmp_path) -> None:
    """What is done is not repeated; a run that was killed goes on."""
    shutil.copytree(folder / "out", tmp_path / "out")
    before = outcomes(tmp_path)
    # as if it had been killed before it was measured: by a run of the script alone, which leaves `last`
    (tmp_path / "out/adapter/outcome.json").unlink()
    budget = json.loads((tmp_path / "out/compare.json").read_text())
    flags = [*Budget(**budget).common_flags, "--overwrite", "--out_dir", tmp_path / "out/adapter"]
    python(ROOT / "finetune/adapter.py", *flags, check=True)

    result = compare(folder, *RATE, out_dir=tmp_path / "out", methods=json.dumps(FOUR))
    assert result.returncode == 0 and "The run is finished: it has done 4 steps" in result.stderr
    assert [line for line in result.stderr.splitlines() if line in CANDIDATES] == ["adapter"]
    assert outcomes(tmp_path)["adapter"]["val_loss"] == before["adapter"]["val_loss"]


def test_the_budget_is_found_by_a_few_steps(folder, tmp_path) -> None:
    result = compare(folder, out_dir=tmp_path / "out", minutes=0.005, methods=json.dumps([LORA]))
    steps = json.loads((tmp_path / "out/compare.json").read_text())["steps"]
    assert result.returncode == 0 and steps >= 1
    rows = read_metrics(tmp_path / "out/LoRA-r-8-query-and-value/metrics.csv")
    assert rows[-1]["step"] == steps
    assert "0.005 minutes are too few: a step of each method takes about" in result.stderr
    assert not (tmp_path / "out/probe").exists()


def test_minutes_are_for_all_of_it() -> None:
    """Starting, loading and validating are in them: the same minutes are for less steps of more methods."""
    probe = 30, [8, 2, 2, 2]  # seconds: a step takes 2 when it is warm, and 16 of a run are none of its steps
    a_step = 2 * FROZEN_SHARE
    assert steps_that_fit(10, ["full"], *probe) == ((600 - 30 - 16) // 2, (30 + 16 + 2) / 60)
    assert steps_that_fit(10, ["full", LORA], *probe)[0] == (600 - 30 - 2 * 16) // (2 + a_step)
    assert steps_that_fit(10, [LORA, "adapter"], *probe)[0] == (600 - 30 - 2 * 16) // (2 * a_step)
    assert steps_that_fit(0.5, ["full"], *probe)[0] < 1
    assert steps_that_fit(1, ["full"], 30, [8])[0] == (60 - 30 - 22) // 8, "the flags ended it after one step"


def test_what_cannot_be_is_refused(folder, tmp_path) -> None:
    result = compare(folder, methods="[lora]")
    assert result.returncode == 2 and result.stderr.startswith("error: No method is called 'lora'. Known are: full;")
    with pytest.raises(InputError, match="holds another comparison"):
        stored_budget(Budget("elsewhere", "data", "", 0, []), folder / "out")
    flags = "--train.learning_rate", "1e30", "--train.max_norm", "null"
    result = compare(folder, *flags, out_dir=tmp_path / "out", steps=2, methods="[full]")
    assert result.returncode == 2 and "full.py failed, for the reason above" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"methods": []}, "--methods is empty"),
        ({"minutes": 0}, "--minutes is 0, expected more than 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"tokens": -1}, "--tokens is -1"),
        ({"tokens": 1, "steps": 1}, "choose one"),
        ({"minutes": 1, "steps": 1}, "choose one"),
        ({}, "last 4 blocks: train_only is 4, but the model has 2 blocks"),
        ({"methods": ["full", LORA], "flags": ["--step", "1"]}, "full: There is no flag --step. Did you mean --steps?"),
        ({"methods": ["full", LORA], "flags": ["--lr", "1"]}, "full: .* Did you mean --train.learning_rate?"),
        ({"methods": ["full", LORA], "flags": ["--quantize", "bnb.nf4"]}, "full: There is no flag --quantize"),
        (
            {"methods": ["full"], "flags": ["--train.max_steps", "1"]},
            "full: --train.max_steps or --train.epochs says when",
        ),
        ({"methods": [LORA, "full"], "flags": ["--precision", "16-true"]}, "full: .*float16 cannot be trained"),
        ({"methods": ["full"], "flags": ["--optimizer", "torch.optim.LBFGS"]}, "full: .*LBFGS cannot step"),
        ({"tokens": 1, "flags": ["--train.global_batch_size", "4"]}, "16 records a step"),
        ({"checkpoint_dir": Path("nowhere")}, "nowhere"),
        ({"data_dir": Path("nowhere")}, "nowhere is not there"),
        ({"general_text": "\n\n \n"}, "general text has no paragraph"),
    ],
)
def test_nothing_is_launched_that_cannot_end_well(flags, message, tiny_dir, data_dir, tmp_path) -> None:
    main = runpy.run_path(str(ROOT / "scripts/compare_methods.py"))["main"]
    if "general_text" in flags:
        (tmp_path / "text.txt").write_text(flags["general_text"])
        flags = flags | {"general_text": tmp_path / "text.txt"}
    settings = {"checkpoint_dir": tiny_dir, "data_dir": data_dir, "out_dir": tmp_path / "out"} | flags
    with pytest.raises(InputError, match=message):
        main(**settings)
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_is_missed_at_once(tiny_dir, data_dir, monkeypatch) -> None:
    monkeypatch.setattr("lit_gpt.packages.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        check_comparison(["full"], ROOT / "finetune", Budget(str(tiny_dir), str(data_dir), "", 1, []), "Some text.")


def test_a_budget_is_one_of_the_same_text(tmp_path) -> None:
    budget = Budget("base", "data", "one text", 3, [])
    write_budget(stored_budget(budget, tmp_path / "out"), tmp_path / "out")
    assert stored_budget(Budget("base", "data", "one text", 0, []), tmp_path / "out") == budget
    of_minutes = replace(budget, minutes=5)
    write_budget(stored_budget(of_minutes, tmp_path / "timed"), tmp_path / "timed")
    for same in (budget, of_minutes, replace(of_minutes, steps=0), replace(budget, steps=0)):
        assert stored_budget(same, tmp_path / "timed") == of_minutes
    for folder, change, was in (
        ("out", {"general_text": "another"}, "general_text was one text"),
        ("out", {"steps": 4}, "steps was 3"),
        ("out", {"steps": 0, "minutes": 5}, "minutes was None"),
        ("timed", {"steps": 0, "minutes": 6}, "minutes was 5"),
    ):
        with pytest.raises(InputError, match=f"holds another comparison: {was}, now"):
            stored_budget(replace(budget, **change), tmp_path / folder)


def test_a_comparison_does_not_go_on_with_other_records(folder, tmp_path) -> None:
    """Prepared anew in the same folder, they would fill one table with losses on different records."""
    data_dir = shutil.copytree(folder / "data", tmp_path / "data")
    begun = json.loads((folder / "out/compare.json").read_text()) | {"data_dir": str(data_dir)}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/compare.json").write_text(json.dumps(begun))
    split = data_dir / "split.bin"
    split.write_bytes(bytes(1 - side for side in split.read_bytes()))
    flags = dict(out_dir=tmp_path / "out", data_dir=data_dir, steps=4, methods=json.dumps([LORA]))
    result = compare(folder, *RATE, **flags)
    assert result.returncode == 2 and "holds another comparison: records was" in result.stderr
    without = Budget("base", "data", "", 1, [])  # as earlier versions wrote it
    (tmp_path / "out/compare.json").write_text(json.dumps(asdict(without)))
    assert stored_budget(replace(without, records="some"), tmp_path / "out") == without


def test_tokens_are_steps_of_mean_records(data_dir) -> None:
    lengths = Dataset(data_dir, "train").lengths()
    assert steps_for(10 * int(lengths.sum()), data_dir) == round(10 * len(lengths) / 16)
    assert steps_for(1, data_dir) == 1


def test_the_loss_before_training_is_that_of_the_original_weights(tmp_path) -> None:
    for name, loss in (("QLoRA-r-8-query-and-value", 3.5), ("adapter", 3.0), ("full", 3.25)):
        (tmp_path / name).mkdir()
        row = dict.fromkeys(HEADER.split(","), "") | {"step": "0", "val_loss": str(loss)}
        (tmp_path / name / "metrics.csv").write_text(f"{HEADER}\n{','.join(row.values())}\n")
    assert loss_before([QLORA, "adapter", "full"], tmp_path) == 3.0
    assert loss_before([QLORA], tmp_path) == 3.5
