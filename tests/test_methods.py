"""Every method from its script to answers, and what may be combined: `pytest tests/test_methods.py`, about 1 min"""

import copy
import io
import math
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tiny
from helpers.methods import METHODS, PROMPTS, TRAIN, exact, finetune, unmoved
from helpers.runs import column, edited, equal, rows_of, write_data
from helpers.scripts import script
from safetensors.torch import load_file, save_file

import lit_gpt.adapter
from lit_gpt import GPT, InputError
from lit_gpt.adapter import (
    Adapter,
    adapter_filter,
    adapter_v2_filter,
    apply_adapter,
    apply_adapter_v2,
)
from lit_gpt.checkpoint.load import build_model, load_model, load_weights
from lit_gpt.checkpoint.weight_files import read_metadata
from lit_gpt.cli import parse
from lit_gpt.config import Config
from lit_gpt.data.dataset import Dataset, micro_batches
from lit_gpt.formats.merge import export_merged
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.generate.decode import generate
from lit_gpt.lora import LoRA, lora_filter
from lit_gpt.make_optimizer import make_optimizer
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing, recompute_blocks
from lit_gpt.model.compile import compile_blocks
from lit_gpt.optimizer_in_backward import OptimizerInBackward
from lit_gpt.runs.load_finetuned import load_finetuned

IN_BACKWARD = replace(TRAIN, optimizer_in_backward=True)


def trains(name: str) -> Callable[[str], bool]:
    """Which parameters of the tiny model a method is there to change."""
    if name.startswith("full"):
        parts = {"full": "", "full last": ("transformer.h.1.", "transformer.ln_f", "lm_head")}
        parts["full pattern"] = ("transformer.h.0.mlp.", "transformer.h.1.norm_1.weight")
        return lambda key: key.startswith(parts[name])
    return {"lora": lora_filter, "adapter": adapter_filter, "adapter_v2": adapter_v2_filter}[name.split()[0]]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory, tiny_dir: Path, data_dir: Path) -> tuple[str, Path]:
    out_dir = tmp_path_factory.mktemp("run") / "out"
    finetune(request.param, tiny_dir, data_dir, out_dir)
    return request.param, out_dir


def test_exactly_its_parameters_moved(run, tiny_dir) -> None:
    """All of them but the prompts of the first step's zero gates, which move from the second on; and no others."""
    name, out_dir = run
    before, after = unmoved(name, tiny_dir).state_dict(), load_finetuned(None, out_dir / "last")[0].state_dict()
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if trains(name)(key)}
    assert column(out_dir, "val_loss")[-1] < column(out_dir, "val_loss")[0]


def test_what_was_saved_is_what_was_trained(run, tiny_dir, data_dir, tmp_path) -> None:
    """The validation loss that the run printed last is that of the saved file, to the last digit."""
    name, out_dir = run
    model = load_finetuned(None, out_dir / "last")[0]
    val_data = Dataset(data_dir, "val")
    with torch.no_grad():
        batches = micro_batches(val_data, range(len(val_data)), 4, 0, 1, True)
        loss, targets = map(sum, zip(*((model(idx, layout=layout), layout.n_targets) for idx, layout in batches)))
    assert (loss / targets).item() == pytest.approx(column(out_dir, "val_loss")[-1], rel=1e-6)
    assert quantized_codes(model) == quantized_codes(unmoved(name, tiny_dir))


def quantized_codes(model: GPT) -> list:
    return [param.sum().item() for key, param in model.named_parameters() if key.endswith("codes")]


def test_a_run_goes_on_as_if_it_had_not_stopped(run, tiny_dir, data_dir, tmp_path) -> None:
    """Stopped after one step and after another, bit for bit; max_hours is looked at after each."""
    name, out_dir = run
    for resume in (False, True, True, True):
        finetune(name, tiny_dir, data_dir, tmp_path / "out", replace(TRAIN, max_hours=1e-9), resume=resume)
    names = {path.relative_to(out_dir) for path in out_dir.rglob("*.safetensors")}
    assert names == {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.safetensors")}
    for file in names:
        if file.parts[0] == "last":  # stopping early validates more often, so that another step may be the best
            assert equal(load_file(out_dir / file), load_file(tmp_path / "out" / file)), file
    losses = [[row["loss"] for row in rows_of(folder) if row["loss"]] for folder in (out_dir, tmp_path / "out")]
    assert losses[0] == losses[1]


def test_answers_are_those_of_the_model(run, data_dir) -> None:
    """generate/base.py --finetuned, with a key-value cache, against the logits of whole texts."""
    name, out_dir = run
    model = load_finetuned(None, out_dir)[0]
    prompt, _ = Dataset(data_dir, "val").question(0)
    text = prompt
    for _ in range(8):
        text = torch.cat((text, model(text[None])[0, -1].argmax()[None]))
    assert generate(model, prompt, len(prompt) + 8, temperature=0.0).tolist() == text.tolist()
    with redirect_stdout(io.StringIO()) as stdout:
        script("generate/base.py").main("What does str.upper do?", finetuned=out_dir, max_new_tokens=5)
    assert stdout.getvalue().strip()


def poison(file: Path, value: float) -> str:
    """Puts a value into the last tensor of a file, and returns its name."""
    tensors, metadata = load_file(file), read_metadata(file)
    name = [key for key in sorted(tensors) if tensors[key].is_floating_point()][-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata)
    return name


def test_weights_that_are_not_finite_are_named(run, tiny_dir, data_dir, tmp_path) -> None:
    """By whoever uses them, and where the run goes on: weights, and the state of the optimizer."""
    method, out_dir = run
    copy = shutil.copytree(out_dir, tmp_path / "out")
    stem = "model" if method.startswith("full") else method.split()[0]
    for part, file in (("best", f"{stem}.safetensors"), ("last", f"{stem}.safetensors"), ("last", "state.safetensors")):
        path = copy / part / file
        whole = path.read_bytes()
        name = poison(path, math.nan if part == "best" else -math.inf)
        with pytest.raises(InputError, match=rf"{part}.*{re.escape(name)}") as caught:
            if part == "best":
                load_finetuned(None, copy)
            else:
                finetune(method, tiny_dir, data_dir, copy, resume=True)
        assert "NaN or infinite values" in str(caught.value)
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory, sample_dir) -> Path:
    """As the tiny model, with other weights."""
    return make_tiny(tmp_path_factory.mktemp("other") / "checkpoint", sample_dir, initializer_range=0.1)


def test_another_base_is_refused(run, other_dir) -> None:
    name, out_dir = run
    if name.startswith("full"):
        with pytest.raises(InputError, match="holds a whole model, nothing to merge: --checkpoint_dir"):
            export_merged(out_dir, None, out_dir / "merged")
    else:
        with pytest.raises(InputError, match="another base"):
            load_finetuned(other_dir, out_dir)


@pytest.mark.parametrize("name", ["full", "full last"])
def test_a_full_model_is_a_folder_of_hugging_face(name, tiny_dir, data_dir, tmp_path) -> None:
    """transformers loads it, and it is a base for what comes next."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finetune(name, tiny_dir, data_dir, tmp_path / "full")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "full/best", output_loading_info=True)
    assert not any(report.values()) and AutoTokenizer.from_pretrained(tmp_path / "full/best")("a").input_ids
    ids = torch.arange(20)[None]
    assert torch.allclose(theirs(ids).logits, load_model(tmp_path / "full/best")(ids), atol=1e-4)
    finetune("lora", tmp_path / "full/best", data_dir, tmp_path / "lora")
    assert load_finetuned(None, tmp_path / "lora")[1].checkpoint_dir == str(tmp_path / "full/best")


def test_full_trains_a_tied_tensor_once(tied_dir, data_dir, tmp_path) -> None:
    finetune("full", tied_dir, data_dir, tmp_path / "full")
    keys = load_file(tmp_path / "full/best/model.safetensors").keys()
    assert "model.embed_tokens.weight" in keys and "lm_head.weight" not in keys
    assert load_finetuned(None, tmp_path / "full")[0].config.tie_embeddings


@pytest.mark.parametrize("name", ["lora", "full"])
def test_bfloat16(name, tiny_dir, data_dir, tmp_path) -> None:
    """Under bf16-true the loss is that of float32, roughly; full trains bfloat16 weights, LoRA float32 ones."""
    for precision in ("32-true", "bf16-true"):
        finetune(name, tiny_dir, data_dir, tmp_path / precision, precision=precision)
    wide, narrow = (column(tmp_path / precision, "loss") for precision in ("32-true", "bf16-true"))
    assert narrow == pytest.approx(wide, rel=0.05) and narrow != wide
    file = "lora.safetensors" if name == "lora" else "model.safetensors"
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "bf16-true/last" / file).values()}
    assert dtypes == {torch.float32 if name == "lora" else torch.bfloat16}


@pytest.mark.parametrize("name", ["adapter", "adapter_v2"])
def test_adapters_are_float32_over_a_bfloat16_base(name, tiny_dir, data_dir, tmp_path) -> None:
    finetune(name, tiny_dir, data_dir, tmp_path / "out", precision="bf16-true")
    tensors = load_file(tmp_path / f"out/last/{name}.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert column(tmp_path / "out", "val_loss")[-1] < column(tmp_path / "out", "val_loss")[0]


# ---- the mathematics of the adapter


@torch.no_grad()
def test_an_adapter_changes_nothing_at_birth(tiny_dir) -> None:
    idx = torch.arange(30).view(2, 15)
    expected = load_model(tiny_dir)(idx)
    for name in ("adapter", "adapter_v2"):
        assert torch.equal(unmoved(name, tiny_dir)(idx), expected)


@torch.no_grad()
def test_the_prompt_is_looked_at_beside_the_text(tiny_dir) -> None:
    """Attention with prompt, by hand from the formula of the paper, for the last token of a text in one head."""
    model = unmoved("adapter", tiny_dir)
    attention = model.transformer.h[1].attn
    attention.adapter_gate.normal_()
    C, hs, head = model.config.n_embd, attention.head_size, 4
    group = head // (model.config.n_head // model.config.n_query_groups)
    q, k, v = (torch.randn(1, heads, 5, hs) for heads in (6, 2, 2))
    y = attention.attend(q, k, v, None)[0, head, -1]

    def softmax(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (q[0, head, -1] @ keys.T / hs**0.5).softmax(-1) @ values

    rows = slice(group * hs, (group + 1) * hs)
    prompt = attention.adapter_prompt
    assert prompt.shape == (3, C)
    expected = softmax(k[0, group], v[0, group])
    expected += attention.adapter_gate[head, 0, 0] * softmax(
        prompt @ attention.k.weight[rows].T, prompt @ attention.v.weight[rows].T
    )
    assert torch.allclose(y, expected, atol=1e-6)


def test_a_prompt_that_is_remembered_would_not_train(tiny_dir) -> None:
    """What `test_exactly_its_parameters_moved` is there to find: keys computed once, before training."""
    keys = "        keys = self.split_heads(self.norm_k(self.k(prompt)))"
    cached = (
        "        if not hasattr(self, 'kept'):\n"
        "            self.kept = [x.detach() for x in (self.norm_k(self.k(prompt)), self.norm_v(self.v(prompt)))]\n"
        "        keys = self.split_heads(self.kept[0])"
    )
    values = "values = self.split_heads(self.norm_v(self.v(prompt)))"
    module = edited(lit_gpt.adapter, (keys, cached), (values, "values = self.split_heads(self.kept[1])"))
    model = build_model(Config.from_checkpoint(tiny_dir))
    load_weights(model, tiny_dir)
    module.apply_adapter(model, PROMPTS)
    module.mark_only_adapter_as_trainable(model)
    torch.nn.init.ones_(model.transformer.h[1].attn.adapter_gate)
    with torch.no_grad():
        model(torch.arange(9)[None])  # a validation before the first step
    model(torch.arange(9)[None]).square().sum().backward()
    assert model.transformer.h[1].attn.adapter_prompt.grad is None


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda model: apply_adapter(model, Adapter(start_layer=2)),
            "start_layer is 2, but the model's blocks are 0 to",
        ),
        (lambda model: Adapter(prompt_length=0), "prompt_length is 0, expected 1 or more"),
        (lambda model: [apply_adapter(model, PROMPTS), apply_adapter_v2(model, PROMPTS)], "already carries an adapter"),
        (lambda model: mark_chosen_as_trainable(model, Full(3)), "train_only is 3, but the model has 2 blocks"),
        (lambda model: mark_chosen_as_trainable(model, Full(["h.1"])), "'h.1', which no parameter's name begins with"),
        (lambda model: make_optimizer(model, TRAIN, "AdamW"), "--optimizer AdamW: .*Name a class by its path"),
        (lambda model: make_optimizer(model, TRAIN, "torch.optim.Adam2"), "Adam2.*Name a class by its path"),
        (lambda model: make_optimizer(model, TRAIN, "torch.nn.Linear"), "Linear is no optimizer"),
        (lambda model: make_optimizer(model, TRAIN, "os.path"), "--optimizer os.path: .*Name a class by its path"),
        (lambda model: mark_chosen_as_trainable(model, Full([])), "train_only is empty"),
        (lambda model: mark_chosen_as_trainable(model, Full(["("])), "no pattern of names"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(act, message, tiny_dir) -> None:
    with pytest.raises(InputError, match=message) as caught:
        act(load_model(tiny_dir).requires_grad_())
    assert "\n" not in str(caught.value)


def test_the_documented_patterns_choose() -> None:
    (command,) = re.findall(r"--train_only ('.*')", (ROOT / "finetune/full.py").read_text())
    only = parse(script("finetune/full.py").main, ["--train_only", *shlex.split(command)])["full"]
    chosen = mark_chosen_as_trainable(build_model(Config.from_name("SmolLM2-135M")), only)
    assert {name.split(".")[2] for name in chosen if ".mlp." in name} == {str(i) for i in range(20, 30)}


def test_a_pattern_ends_where_a_name_does(tiny_dir) -> None:
    model = load_model(tiny_dir)
    assert mark_chosen_as_trainable(model, Full(["transformer.h.1.mlp.fc_1"])) == ["transformer.h.1.mlp.fc_1.weight"]
    assert all("attn" in name for name in mark_chosen_as_trainable(model, Full([r"transformer\.h\.\d+\.attn\."])))
    with pytest.raises(InputError, match="no parameter's name begins with"):
        mark_chosen_as_trainable(model, Full(["transformer.h.1.mlp.fc"]))


# ---- combinations: shared prefixes, and blocks computed again in backward


def gradients(model: GPT, data_dir: Path, size: int, share: bool) -> dict[str, torch.Tensor]:
    data = Dataset(data_dir, "train")
    for idx, layout in micro_batches(data, range(6), size, 0, 1, share):
        assert share == any(segment.prefix_length for segment in layout.segments)
        model(idx, layout=layout).backward()
    return {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_sharing_prefixes_and_computing_again_change_no_gradient(name, tiny_dir, data_dir) -> None:
    expected = gradients(exact(name, tiny_dir), data_dir, 1, share=False)
    assert all(grad is not None and grad.abs().max() > 0 for grad in expected.values())
    for how, share in (("none", True), ("block", True), ("selective", False), ("selective", True)):
        model = exact(name, tiny_dir)
        recompute_blocks(model, how)
        found = gradients(model, data_dir, 6, share)
        for key in expected:
            assert (found[key] - expected[key]).abs().max() <= 1e-10 * expected[key].abs().max(), (key, how, share)


def test_blocks_computed_again_singly_give_the_same_bits(tiny_dir, data_dir) -> None:
    n_layer = Config.from_checkpoint(tiny_dir).n_layer
    expected = gradients(exact("full", tiny_dir), data_dir, 6, share=False)
    for how in range(1, n_layer + 1):
        model = exact("full", tiny_dir)
        recompute_blocks(model, how)
        found = gradients(model, data_dir, 6, share=False)
        assert equal(found, expected)


def test_a_run_may_go_on_with_other_blocks_computed_again(tiny_dir, data_dir, tmp_path) -> None:
    """It is the same run, and hyperparameters.yaml repeats it."""
    finetune("lora", tiny_dir, data_dir, tmp_path / "whole")
    out_dir = tmp_path / "parts"
    finetune("lora", tiny_dir, data_dir, out_dir, replace(TRAIN, max_hours=1e-9), activation_checkpointing=1)
    repeated = parse(script("finetune/lora.py").main, ["--config", str(out_dir / "hyperparameters.yaml")])
    assert repeated["args"].activation_checkpointing == 1
    finetune("lora", tiny_dir, data_dir, out_dir, activation_checkpointing=2, resume=True)
    assert column(out_dir, "loss") == column(tmp_path / "whole", "loss")


def test_less_is_kept_for_backward(tiny_dir, data_dir) -> None:
    ((idx, layout),) = micro_batches(Dataset(data_dir, "train"), range(6), 6, 0, 1, False)

    def kept(how: ActivationCheckpointing) -> int:
        """Bytes, without the parameters."""
        model, sizes = exact("full", tiny_dir), {}
        recompute_blocks(model, how)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.update({x.data_ptr(): x.nbytes}) or x, abs):
            model.hidden(idx, layout=layout)
        weights = {param.data_ptr() for param in model.parameters()}
        return sum(size for at, size in sizes.items() if at not in weights)

    assert kept("block") < 0.5 * kept("selective") and kept("selective") < 0.8 * kept("none")
    assert kept("block") == kept(2) < kept(1) < kept("none")


def test_dropout_is_the_same_when_computed_again(tiny_dir, data_dir, tmp_path) -> None:
    settings = {"lora": LoRA(dropout=0.3)}
    for how in ("none", "block", "selective"):
        finetune("lora", tiny_dir, data_dir, tmp_path / how, activation_checkpointing=how, **settings)
    for how in ("block", "selective"):
        assert rows_of(tmp_path / how) == rows_of(tmp_path / "none")


def test_compiled(tiny_dir, data_dir, tmp_path) -> None:
    """The same run; and other lengths compile nothing anew."""
    from torch._dynamo.utils import counters

    for compiled in (False, True):
        finetune("lora", tiny_dir, data_dir, tmp_path / str(compiled), compile=compiled)
    plain, compiled = (column(tmp_path / which, "loss") for which in ("False", "True"))
    assert compiled == pytest.approx(plain, rel=1e-5) and len(plain) == 4
    graphs = counters["stats"]["unique_graphs"]
    finetune("lora", tiny_dir, data_dir, tmp_path / "again", replace(TRAIN, seed=2), compile=True)
    assert 0 < graphs and counters["stats"]["unique_graphs"] <= 2 * graphs, "as many as for a new model"


# ---- optimizers


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("lora", {"optimizer": "torch.optim.LBFGS"}, "LBFGS cannot step: .*closure'. Choose torch.optim.AdamW"),
        ("adapter", {"optimizer": "torch.optim.SparseAdam"}, "SparseAdam cannot step: .*dense gradients"),
        ("lora", {"optimizer": "torch.optim.Adam2"}, "Adam2.*Name a class by its path"),
        ("lora", {"activation_checkpointing": 3}, "--activation_checkpointing is 3, expected 1 to 2"),
        ("full", {"train": IN_BACKWARD, "precision": "16-mixed"}, "in_backward steps before .* overflows in float16"),
        ("lora", {"train": IN_BACKWARD, "optimizer": "test_methods.SumsOverAll"}, "SumsOverAll needs all gradients at"),
        ("full", {"precision": "16-true"}, "weights in float16 cannot be trained themselves. Choose 16-mixed or bf16"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_written(
    name, flags, message, tiny_dir, data_dir, tmp_path
) -> None:
    with pytest.raises(InputError, match=message):
        finetune(name, tiny_dir, data_dir, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("max_norm", "flags"),
    [
        (None, {}),
        (0.5, {"activation_checkpointing": "block", "precision": "bf16-true"}),
        (0.5, {"optimizer": "torch.optim.SGD", "activation_checkpointing": 1}),
    ],
)
def test_all_weights_train_the_same_with_the_optimizer_in_backward(
    max_norm, flags, tied_dir, data_dir, tmp_path
) -> None:
    """To the bit. The gradient of the embedding comes from two places."""
    train = replace(TRAIN, max_steps=2, max_norm=max_norm)
    finetune("full", tied_dir, data_dir, tmp_path / "after", train, **flags)
    finetune("full", tied_dir, data_dir, tmp_path / "in", replace(train, optimizer_in_backward=True), **flags)
    assert rows_of(tmp_path / "in") == rows_of(tmp_path / "after")
    for file in ("model.safetensors", "state.safetensors"):
        assert equal(*(load_file(tmp_path / run / "last" / file) for run in ("in", "after")))


def test_compiled_blocks_with_the_optimizer_in_backward(tiny_dir, data_dir) -> None:
    """The same bits as compiled blocks and the optimizer after backward."""
    ((idx, layout),) = micro_batches(Dataset(data_dir, "train"), range(6), 6, 0, 1, False)
    model = unmoved("full", tiny_dir)
    mark_chosen_as_trainable(model, Full())
    before = copy.deepcopy(model.state_dict())
    compile_blocks(model)
    recompute_blocks(model, 1)
    weights = []
    for in_backward in (False, True):
        model.load_state_dict(before)
        optimizer = make_optimizer(model, TRAIN)
        if in_backward:
            OptimizerInBackward(optimizer, max_norm=None)
        for _ in range(2):
            model(idx, layout=layout).backward()
            optimizer.step()  # nothing is left to do for it in backward
            optimizer.zero_grad()
        weights.append(copy.deepcopy(model.state_dict()))
    assert equal(*weights) and not equal(weights[0], before)


class SumsOverAll(torch.optim.SGD):
    """An optimizer that divides by the norm of all gradients that it finds."""

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        for grad in grads:
            grad /= norm
        return super().step(closure)


@pytest.mark.parametrize("path", ["torch.optim.SGD", "torch.optim.Adafactor", "bitsandbytes.optim.AdamW8bit"])
def test_optimizers_by_class_path(path, tiny_dir, data_dir, tmp_path, capsys) -> None:
    """They train, and go on bit for bit. A run says its plan, or that there is none."""
    finetune("lora", tiny_dir, data_dir, tmp_path / "whole", optimizer=path)
    planned = "No plan of the memory" if "Adafactor" in path else "Planned peak of a step: "
    assert planned in capsys.readouterr().err
    for resume in (False, True, True, True):
        train = replace(TRAIN, max_hours=1e-9)
        finetune("lora", tiny_dir, data_dir, tmp_path / "parts", train, optimizer=path, resume=resume)
    whole, parts = (load_file(tmp_path / part / "last/lora.safetensors") for part in ("whole", "parts"))
    assert equal(whole, parts) and any(tensor.abs().sum() > 0 for key, tensor in whole.items() if "lora_B" in key)
    with pytest.raises(InputError, match="optimizer was"):
        finetune("lora", tiny_dir, data_dir, tmp_path / "parts", optimizer="torch.optim.Adam", resume=True)


class CountsInItsGroups(torch.optim.SGD):
    """Like Prodigy and D-Adaptation it keeps what it has learnt beside its settings: the rate grows with each step."""

    def __init__(self, groups: list[dict], lr: float) -> None:
        super().__init__(groups, lr)
        for group in self.param_groups:
            group["steps"] = torch.zeros(())

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["estimate"] = group.get("estimate", 0.1) * 1.5
            group["steps"] += 1
            group["lr"] = group["lr"] * group["estimate"] * group["steps"].item()
            for param in group["params"]:
                self.state[param]["seen"] = self.state[param].get("seen", 0.1) / 3  # a number of 64 bits
        super().step(closure)


def test_what_an_optimizer_keeps_for_its_groups_goes_on(tiny_dir, data_dir, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.optim, "CountsInItsGroups", CountsInItsGroups, raising=False)
    path, soon = "torch.optim.CountsInItsGroups", replace(TRAIN, max_hours=1e-9)
    finetune("lora", tiny_dir, data_dir, tmp_path / "whole", optimizer=path)
    for resume in (False, True, True, True):
        finetune("lora", tiny_dir, data_dir, tmp_path / "parts", soon, optimizer=path, resume=resume)
    for file in ("lora.safetensors", "state.safetensors"):
        assert equal(*(load_file(tmp_path / part / "last" / file) for part in ("whole", "parts")))
