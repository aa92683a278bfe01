"""Several fine-tuned models on one copy of the weights: `pytest tests/test_side_by_side.py`, about 30 s"""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.families import weights_of
from helpers.methods import finetune
from helpers.runs import write_data

from lit_gpt import GPT, InputError
from lit_gpt.checkpoint.load import load_model
from lit_gpt.checkpoint.peft import save_peft
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.fast_linears import prepare_for_answers
from lit_gpt.lora import LoRA
from lit_gpt.runs.load_finetuned import UseArgs, load_finetuned
from lit_gpt.runs.methods import METHODS
from lit_gpt.runs.side_by_side import load_models_for_use, model_names

CPU = torch.device("cpu")
DORA = LoRA(r=2, dora=True, head=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tied_dir: Path) -> dict[str, Path]:
    """A folder of trained weights of each kind, all on the same base; it is tied, which is harder to share."""
    folder = tmp_path_factory.mktemp("runs")
    data_dir = write_data(folder / "data", tied_dir)
    runs = {"dora": folder / "dora"}
    finetune("lora", tied_dir, data_dir, runs["dora"], lora=DORA)
    for name in ("lora", "lora nf4", "adapter", "adapter_v2", "full"):
        runs[name] = folder / name
        finetune(name, tied_dir, data_dir, runs[name])
    # and one that another program has written
    runs["peft"] = folder / "peft"
    runs["peft"].mkdir()
    model, header = load_finetuned(None, runs["lora"])
    lora = LoRA(**header.settings)
    save_peft(weights_of(model), lora, model.config, str(tied_dir), runs["peft"])
    return runs


def storages(model: GPT) -> dict[int, int]:
    """The bytes of a model's parameters, by where they lie. One that was packed for a CPU is nobody else's."""
    tensors = [param.untyped_storage() for param in model.parameters() if not param.is_mkldnn]
    return {storage.data_ptr(): storage.nbytes() for storage in tensors}


ADAPTERS = ("lora", "dora", "peft", "adapter", "adapter_v2")


@torch.no_grad()
@pytest.mark.parametrize("quantize", ["none", "bnb.nf4", "bnb.int8"])
def test_they_share_what_is_frozen_and_say_what_each_says_alone(quantize, runs) -> None:
    args = UseArgs(quantize=quantize)
    models, tokenizer, style = load_models_for_use(args, [runs[name] for name in ADAPTERS], CPU, with_base=True)
    assert list(models) == ["base", *ADAPTERS] and style == "chat"
    idx = tokenizer.encode("What does str.upper do?")[None]
    of_base = storages(models["base"])
    memory = dict(of_base)
    n_bytes_trained = 0
    logits = {"base": models["base"](idx)}
    for name in ADAPTERS:
        alone = prepare_for_answers(load_finetuned(None, runs[name], quantize=quantize)[0], shares_weights=True)
        logits[name] = models[name](idx)
        assert logits[name].equal(alone(idx))
        # what it has of its own is what the method trains, and nothing of it is the base's
        method = METHODS["lora" if name in ("dora", "peft") else name]
        own = {key for key, param in models[name].named_parameters() if param.data_ptr() not in of_base}
        assert own == {key for key, _ in alone.named_parameters() if method.filter(key, None)}
        n_bytes_trained += sum(param.nbytes for key, param in models[name].named_parameters() if key in own)
        memory |= storages(models[name])
        memory_alone = sum(storages(alone).values())
        assert sum(storages(models[name]).values()) == memory_alone
    # six models take a base and what five have trained: a quarter of a base, where nearly all of it is embedding
    assert sum(memory.values()) == sum(of_base.values()) + n_bytes_trained < 1.25 * sum(of_base.values())
    # whoever came later has changed nothing of who came before: the base is what it is alone, and none is another
    checkpoint_dir = load_finetuned(None, runs["lora"])[1].checkpoint_dir
    kind = None if quantize == "none" else quantize
    base = prepare_for_answers(load_model(Path(checkpoint_dir), quantize=kind), shares_weights=True)
    assert logits["base"].equal(base(idx))
    different = [name for name in logits if name != "peft"]
    assert not any(logits[a].equal(logits[b]) for a in different for b in different if a != b)
    assert logits["peft"].equal(logits["lora"])


@torch.no_grad()
def test_one_scale_for_all(runs) -> None:
    """It is that of each alone; and 0 is the base, whatever was trained."""
    names = ("lora", "dora", "adapter", "adapter_v2")
    for scale in (0.0, 0.5):
        args = UseArgs(scale=scale)
        models, tokenizer, _ = load_models_for_use(args, [runs[name] for name in names], CPU, with_base=True)
        idx = tokenizer.encode("What does str.upper do?")[None]
        for name in names:
            alone, _ = load_finetuned(None, runs[name], scale=scale)
            alone = prepare_for_answers(alone, shares_weights=True)
            assert models[name](idx).equal(alone(idx))
            assert models[name](idx).equal(models["base"](idx)) == (scale == 0)
    with pytest.raises(InputError, match=r"^--scale 0\.5 is for LoRA and adapters, .*full holds a whole model"):
        load_models_for_use(args, [runs["lora"], runs["full"]], CPU)


@torch.no_grad()
def test_a_whole_model_beside_the_others(runs) -> None:
    models, tokenizer, _ = load_models_for_use(UseArgs(finetuned=runs["full"]), [runs["lora"]], CPU, with_base=True)
    assert list(models) == ["base", "full", "lora"]
    assert not storages(models["full"]).keys() & storages(models["base"]).keys()
    idx = tokenizer.encode("Who?")[None]
    for name in ("full", "lora"):
        torch.testing.assert_close(models[name](idx), load_finetuned(None, runs[name])[0](idx), rtol=1e-4, atol=1e-5)
    # its base is what it was trained from
    whole, _, _ = load_models_for_use(UseArgs(), [runs["full"]], CPU, with_base=True)
    assert list(whole) == ["base", "full"] and whole["base"](idx).equal(models["base"](idx))


def test_one_model_and_none(runs, tied_dir) -> None:
    assert list(load_models_for_use(UseArgs(), [runs["lora nf4"]], CPU)[0]) == ["lora nf4"]
    assert list(load_models_for_use(UseArgs(checkpoint_dir=tied_dir), [], CPU, with_base=True)[0]) == ["base"]


def test_what_does_not_go_together_is_one_line(runs, tiny_dir, tmp_path) -> None:
    def refused(*folders: Path, said: str, **args) -> None:
        with pytest.raises(InputError, match=said) as error:
            load_models_for_use(UseArgs(**args), folders, CPU)
        assert "\n" not in str(error.value)

    refused(runs["lora"], runs["lora nf4"], said="lora nf4 was trained on weights in bnb.nf4, .* --quantize none, or")
    refused(runs["lora"], runs["lora"], said="is named twice")
    refused(runs["lora"], runs["adapter"], said="--stream_blocks is for one model", stream_blocks=True)
    refused(runs["lora"], tmp_path / "gone", said="gone")
    # another base, and one that has changed since
    data_dir = write_data(tmp_path / "data", tiny_dir)
    finetune("lora", tiny_dir, data_dir, tmp_path / "other")
    refused(runs["lora"], tmp_path / "other", said="other was trained on another base than")
    refused(runs["lora"], runs["adapter"], said="was trained on another base than", checkpoint_dir=tiny_dir)
    # another tokenizer
    other = shutil.copytree(runs["peft"], tmp_path / "peft")
    shutil.copy(tiny_dir / "tokenizer_config.json", other)
    vocabulary = (tiny_dir / "tokenizer.json").read_text(encoding="utf-8")
    other_vocabulary = vocabulary.replace("<jupyter_start>", "<jupyter_begin>")
    (other / "tokenizer.json").write_text(other_vocabulary, encoding="utf-8")
    refused(runs["lora"], other, said="peft has another tokenizer than")


def test_other_prompt_styles_are_said(runs, tied_dir, tmp_path, capsys) -> None:
    records = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(12)]
    prepare(records, DataArgs(checkpoint_dir=tied_dir, data_dir=tmp_path / "data", prompt_style="alpaca"))
    finetune("lora", tied_dir, tmp_path / "data", tmp_path / "alpaca")
    capsys.readouterr()
    _, _, style = load_models_for_use(UseArgs(), [runs["lora"], tmp_path / "alpaca"], CPU)
    assert style == "chat" and "alpaca: trained in another prompt style than" in capsys.readouterr().err
    load_models_for_use(UseArgs(), [runs["lora"], runs["adapter"], runs["peft"]], CPU)
    assert capsys.readouterr().err == ""


def test_names(tmp_path) -> None:
    def names(*folders: str) -> list[str]:
        return model_names([tmp_path / folder for folder in folders])

    for run in ("lora/mine", "adapter/mine"):
        (tmp_path / run / "best").mkdir(parents=True)
    assert names("lora/mine") == names("lora/mine/best") == ["mine"]
    assert names("lora/mine", "adapter/mine/best") == ["lora/mine", "adapter/mine"]
    assert names("lora/mine", "lora/mine/last") == ["mine", "mine/last"]
    assert names("base", "lora/mine") == [f"{tmp_path.name}/base", "lora/mine"]
    with pytest.raises(InputError, match="mine/best is named twice"):
        names("lora/mine", "lora/mine/best")
