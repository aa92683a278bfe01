"""scripts/choose_scale.py on a tiny model: `pytest tests/test_choose_scale.py`, about 10 s"""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers.methods import finetune
from helpers.runs import write_data
from helpers.scripts import script

from lit_gpt import InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.data.dataset import Dataset
from lit_gpt.evaluation.choose_scale import AtScale, Comparison, check_can_scale
from lit_gpt.evaluation.forgetting import Forgetting, forgetting, general_records, read_general_text, remember_base
from lit_gpt.evaluation.record_losses import dataset_losses
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.methods import METHODS
from lit_gpt.scores.record_scores import losses, read_scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_dir: Path) -> Path:
    """Runs of two methods, and the data that they were trained on."""
    folder = tmp_path_factory.mktemp("scales")
    write_data(folder / "data", tiny_dir)
    for name in ("lora", "adapter_v2"):
        finetune(name, tiny_dir, folder / "data", folder / name)
    return folder


def choose(finetuned: Path, out_dir: Path, **flags) -> dict:
    """Runs the script, and returns what it wrote for programs."""
    script("scripts/choose_scale.py").main(finetuned, out_dir=out_dir, **flags)
    return json.loads((out_dir / "scales.json").read_text())


def test_each_scale_is_the_model_that_has_it(folder, tiny_dir, tmp_path, capsys) -> None:
    """The base, what was trained, and what the command that is printed merges."""
    found = choose(folder / "lora", tmp_path / "out", scales=[1.25, 0.5])
    assert [one["scale"] for one in found["scales"]] == [0, 0.5, 1, 1.25]
    of = {one["scale"]: one for one in found["scales"]}
    best = found["best"]
    assert best == min(of, key=lambda scale: of[scale]["validation_loss"]["mean"]) > 0

    merge = shlex.split(found["use"])
    assert found["use"] in capsys.readouterr().out and merge[1].endswith("scripts/merge_lora.py")
    assert merge[merge.index("--scale") + 1] == f"{best:g}"
    script("scripts/merge_lora.py").main(folder / "lora", tmp_path / "merged", scale=best)

    data = Dataset(folder / "data", "val")
    base = load_model(tiny_dir)
    text = general_records(read_general_text(), Tokenizer(tiny_dir), base.config.block_size)
    remembered = remember_base(base, text)
    models = {0: base, 1: load_finetuned(None, folder / "lora")[0], best: load_model(tmp_path / "merged")}
    for scale, model in models.items():
        assert of[scale]["validation_loss"]["mean"] == pytest.approx(dataset_losses(model, data).mean, rel=1e-5)
        expected = forgetting(model, remembered, text).kl.mean
        assert of[scale]["kl_to_base"]["mean"] == pytest.approx(expected, rel=1e-3, abs=1e-6)

    # the files
    (loss, _) = read_scores(tmp_path / "out/scores-0.5.csv")
    assert loss.mean == pytest.approx(of[0.5]["validation_loss"]["mean"])
    assert (tmp_path / "out/scales.png").read_bytes().startswith(b"\x89PNG")
    assert f"| **{best:g}** |" in (tmp_path / "out/scales.md").read_text()


def test_an_adapter_within_a_limit(folder, tmp_path) -> None:
    """Again in the same folder, where the old comparison is replaced. An adapter is used unmerged."""
    everything = choose(folder / "adapter_v2", tmp_path / "out", scales=[0.3, 0.6], limit=5)
    assert everything["records"] == 5 and "generate/chat.py" in everything["use"]
    forgotten = {one["scale"]: one["kl_to_base"]["mean"] for one in everything["scales"]}
    assert list(forgotten.values()) == sorted(forgotten.values()) and forgotten[0] == 0
    assert everything["best"] > 0.3
    limit = (forgotten[0.3] + forgotten[0.6]) / 2
    within = choose(folder / "adapter_v2", tmp_path / "out", scales=[0.3], limit=5, max_forgetting=limit)
    assert within["best"] == 0.3
    names = {path.name for path in (tmp_path / "out").glob("scores-*.csv")}
    assert names == {"scores-0.csv", "scores-0.3.csv", "scores-1.csv"}


def test_the_best_by_the_rule() -> None:
    def at(scale: float, loss: float, kl: float) -> AtScale:
        ids = ["a", "b", "c"]
        scores = losses([loss * 3, loss * 2, loss * 4], [3, 2, 4], ids)
        return AtScale(scale, scores, Forgetting(scores, losses([kl, kl, kl], [1, 1, 1], ids, "KL to the base")))

    measured = [at(0, 4.0, 0.0), at(0.5, 3.0, 0.125), at(1, 2.5, 0.5), at(1.25, 2.5, 0.75)]
    for limit, best in ((None, 1), (0.5, 1), (0.25, 0.5), (0.125, 0.5), (0.0625, 0), (0, 0)):
        assert Comparison(measured, limit).best.scale == best


def test_what_cannot_be_compared_is_refused_in_a_line(folder, tmp_path) -> None:
    def refused(said: str, finetuned: str = "lora", out_dir: Path = tmp_path / "out", **flags) -> None:
        with pytest.raises(InputError, match=said) as error:
            choose(folder / finetuned, out_dir, **flags)
        assert "\n" not in str(error.value)

    with pytest.raises(
        InputError, match=r"full holds a whole model, and only the change of a LoRA or an adapter can be"
    ):
        check_can_scale(METHODS["full"], Path("out/full"))
    refused("gone is not there", "gone")
    refused("gone.txt is missing", general_text=tmp_path / "gone.txt")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("Mine.")
    refused("notes is not empty, and holds no comparison of scales", out_dir=tmp_path / "notes")
    # prepared data of one validation record
    (tmp_path / "data").mkdir()
    for file in (folder / "data").iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    split = np.fromfile(tmp_path / "data/split.bin", np.uint8)
    split[np.flatnonzero(split == 1)[1:]] = 0
    split.tofile(tmp_path / "data/split.bin")
    refused("data has 1 validation record, expected two or more", data_dir=tmp_path / "data")
    assert not (tmp_path / "out").exists()
