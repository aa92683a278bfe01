"""Streamed blocks compute what resident ones do, to the bit: `pytest tests/test_stream_blocks.py`, about 30 s

On a CPU two storages stand for the host and the device, and `OnlyCopiesReadTheHost` keeps them apart. There a copy is
done when it is asked for, as early as on any device: a slot that is overwritten too soon shows. `LateCopies` does it as
late as any device may, and until then the slot is full of NaN: a slot that is read too soon shows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import cached
from helpers.runs import edited, rows_of, write_data
from helpers.scripts import script
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lit_gpt.memory.plan
import lit_gpt.stream_blocks
from lit_gpt import GPT, Config, InputError
from lit_gpt.adapter import Adapter
from lit_gpt.checkpoint.load import build_model, load_weights, parameter_shapes, replace_parameter
from lit_gpt.device import CopyStream
from lit_gpt.generate.decode import generate
from lit_gpt.lora import LoRA
from lit_gpt.memory.ledger import Ledger, enter_model
from lit_gpt.memory.plan import Setup, adapt, batch_of, fill_with_zeros
from lit_gpt.model.compile import compile_blocks
from lit_gpt.quantize import quantize_linears
from lit_gpt.recipe import LaunchArgs, check_streaming
from lit_gpt.runs.load_finetuned import UseArgs, load_finetuned, load_for_use
from lit_gpt.stream_blocks import BlockStream, stream_blocks, stream_of
from lit_gpt.train import TrainArgs

SMALL = Config(
    name="small", n_layer=4, n_head=4, n_query_groups=2, n_embd=64, intermediate_size=96, vocab_size=128,
    block_size=128,
)  # fmt: skip
SIZES = dict(n_head=4, n_embd=64, head_size=16, intermediate_size=96, vocab_size=128, block_size=128)
GEMMA = Config.from_name("google/gemma-3-270m", n_layer=6, n_query_groups=1, **SIZES)
EXPERTS = Config.from_name("mistralai/Mixtral-8x7B-v0.1", n_layer=4, n_query_groups=2, n_expert=4, **SIZES)
GPT_2 = Config.from_name("openai-community/gpt2", n_layer=3, n_query_groups=4, **SIZES)

BASE = Setup(SMALL, settings=LoRA(r=4), dtype=torch.float32)
ADAPTER = Adapter(prompt_length=3, start_layer=1)
SETUPS = {
    "lora": BASE,
    "lora bf16": replace(BASE, dtype=torch.bfloat16),
    "lora nf4": replace(BASE, quantize="bnb.nf4"),
    "lora nf4-dq bf16": replace(BASE, quantize="bnb.nf4-dq", dtype=torch.bfloat16),
    "lora int8": replace(BASE, quantize="bnb.int8"),
    "lora of the last blocks": replace(BASE, settings=LoRA(r=4, layers=2, mlp=False)),
    "lora of attention": replace(BASE, settings=LoRA(r=4, mlp=False)),
    "lora, mixed": replace(BASE, autocast=torch.bfloat16),
    "lora of a tied head": replace(BASE, config=SMALL.replace(tie_embeddings=True), settings=LoRA(r=4, head=True)),
    "dropout": replace(BASE, settings=LoRA(r=4, dropout=0.3), quantize="bnb.nf4"),
    "dora": replace(BASE, settings=LoRA(r=4, dora=True)),
    "dora nf4": replace(BASE, settings=LoRA(r=4, dora=True), quantize="bnb.nf4"),
    "adapter nf4": replace(BASE, method="adapter", settings=ADAPTER, quantize="bnb.nf4"),
    "adapter_v2": replace(BASE, method="adapter_v2", settings=ADAPTER),
    "two kinds of rotations": replace(BASE, config=GEMMA, quantize="bnb.nf4-dq"),
    "experts": replace(BASE, config=EXPERTS),
    "experts nf4": replace(BASE, config=EXPERTS, quantize="bnb.nf4"),
    "biases": replace(BASE, config=GPT_2, quantize="bnb.int8"),
    "one block": replace(BASE, config=SMALL.replace(n_layer=1)),
    "two blocks": replace(BASE, config=SMALL.replace(n_layer=2)),
}
LATE_TOO = ("lora nf4", "lora of attention", "adapter_v2")  # when copies are done is no question of the kind of block
MICRO_BATCHES = ((20, 7), (15,), (9, 12))  # the lengths of their records


class LateCopies(CopyStream):
    """Copies are done when somebody waits for them, in the order in which they were asked for; before, NaN is there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.asked_for: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.n_done = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> int:
        target.fill_(255)  # NaN in every dtype of floating point
        self.asked_for.append((target, source))
        return len(self.asked_for)

    def wait(self, copied: int) -> None:
        for target, source in self.asked_for[self.n_done : copied]:
            target.copy_(source)
        self.n_done = max(self.n_done, copied)


class OnlyCopiesReadTheHost(TorchDispatchMode):
    """Refuses to compute with what is in the host's memory, as a GPU does."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        stream = stream_of(model)
        self.on_host = {block.buffer.untyped_storage().data_ptr() for block in stream.blocks}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_allowed = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._has_compatible_shallow_copy_type)
        for tensor in tree_leaves((args, kwargs or {})):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self.on_host:
                assert is_allowed, f"{func} reads the host's memory"
        return func(*args, **(kwargs or {}))


def trained_model(setup: Setup, stream: bool, compiled: bool = False) -> GPT:
    """A model ready to train, the same in every call; with blocks recomputed, or streamed."""
    torch.manual_seed(0)
    model = build_model(setup.config)
    quantize_linears(model, setup.quantize)
    for name, shape in parameter_shapes(setup.config).items():
        weight = torch.randn(shape) * 0.1 + float(len(shape) == 1)
        replace_parameter(model, name, weight, setup.dtype)
    if setup.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    model.to("cpu")
    if compiled:
        compile_blocks(model)
    model = adapt(model, replace(setup, stream_blocks=stream, activation_checkpointing="block"))
    for param in trained(model).values():
        nn.init.normal_(param.data, std=0.1)
    return model.train()


def trained(model: GPT) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def results_of_a_run(model: GPT, setup: Setup) -> list[torch.Tensor]:
    """All that a short run computes: a validation, a step of two micro-batches, an answer, and another pass."""
    results = []
    with torch.no_grad():
        idx, layout = batch_of((30,))
        results.append(model.eval()(idx, layout=layout))

    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    torch.manual_seed(0)  # of dropout
    for number, lengths in enumerate(MICRO_BATCHES):
        model.train()
        idx, layout = batch_of(lengths)
        idx = torch.randint(0, setup.config.vocab_size, idx.shape)
        with torch.autocast("cpu", setup.autocast, enabled=setup.autocast is not None):
            loss = model(idx, layout=layout)
        loss.backward()
        results.append(loss.detach())
        if number == 0:  # the step has another micro-batch
            continue
        results += [param.grad.clone() for param in trained(model).values() if param.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        if number == 1:
            # by a key-value cache and in inference mode
            answer = generate(model.eval(), torch.arange(5), 7, temperature=0.0)
            results.append(answer.clone())
    return results


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(result.isfinite().all() for result in found)


@pytest.mark.parametrize("name", SETUPS)
def test_a_run_is_the_same_to_the_bit(name: str, monkeypatch) -> None:
    setup = SETUPS[name]
    expected = results_of_a_run(trained_model(setup, stream=False), setup)
    for copies in (CopyStream, LateCopies) if name in LATE_TOO else (CopyStream,):
        monkeypatch.setattr(lit_gpt.stream_blocks, "CopyStream", copies)
        model = trained_model(setup, stream=True)
        with OnlyCopiesReadTheHost(model):
            found = results_of_a_run(model, setup)
        assert_same(found, expected)


BROKEN = {
    "kept for backward and not computed again": (
        CopyStream,
        "recomputed(fetched_before(block.forward, stream, number))",
        "fetched_before(block.forward, stream, number)",
    ),
    "not fetched again": (
        CopyStream,
        "recomputed(fetched_before(block.forward, stream, number))",
        "fetched_before(recomputed(block.forward), stream, number)",
    ),
    "overwritten too soon": (CopyStream, "is not at_work)", "is at_work)"),
    "read too soon": (LateCopies, "self.copies.wait(slot.copied)", "pass"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_faults_would_show(fault: str, monkeypatch) -> None:
    """The same comparison fails where a line of the module is wrong."""
    copies, right, wrong = BROKEN[fault]
    broken = edited(lit_gpt.stream_blocks, (right, wrong))
    monkeypatch.setattr(broken, "CopyStream", copies)
    setup = SETUPS["lora of attention"]  # other linears keep a view of their weight for backward
    expected = results_of_a_run(trained_model(setup, stream=False), setup)
    monkeypatch.setattr(lit_gpt.memory.plan, "stream_blocks", broken.stream_blocks)
    model = trained_model(setup, stream=True)
    with pytest.raises(AssertionError), OnlyCopiesReadTheHost(model):
        assert_same(results_of_a_run(model, setup), expected)


# ---- what is where, and when it is copied


def number_of_copies(stream: BlockStream, act: Callable[[], Any]) -> float:
    """How many blocks `act` lets come to the device."""
    before = stream.n_copied
    act()
    return (stream.n_copied - before) / stream.blocks[0].buffer.numel()


def test_every_block_is_copied_once_on_each_way() -> None:
    """But for the two that are there at each end; and none is waited for that was not on its way before."""
    model = trained_model(BASE, stream=True)
    stream = stream_of(model)
    n = SMALL.n_layer
    idx, layout = batch_of((20,))

    def step() -> None:
        model(idx, layout=layout).backward()

    @torch.no_grad()
    def validate() -> None:
        model(idx, layout=layout)

    step()
    assert [number_of_copies(stream, step) for _ in range(3)] == [2 * (n - 2)] * 3
    validate()
    assert [number_of_copies(stream, validate) for _ in range(3)] == [n] * 3  # one ahead all the time
    assert number_of_copies(stream, step) == (n - 1) + (n - 2)


def test_a_block_is_on_its_way_before_it_begins(monkeypatch) -> None:
    """In a step, in a validation, and where one follows the other; the very first one is not."""
    model = trained_model(BASE, stream=True)
    stream = stream_of(model)
    idx, layout = batch_of((20,))
    late = []
    begin = stream.begin

    def watched(number: int) -> None:
        if stream.blocks[number] not in [slot.block for slot in stream.slots]:
            late.append(number)
        begin(number)

    monkeypatch.setattr(stream, "begin", watched)
    for _ in range(2):
        for _ in range(2):
            model(idx, layout=layout).backward()
        for _ in range(2):
            with torch.no_grad():
                model(idx, layout=layout)
    assert late == [0]


def test_parameters_point_to_the_host_or_to_a_slot() -> None:
    setup = SETUPS["lora nf4"]
    plain = trained_model(setup, stream=False)
    model = trained_model(setup, stream=True)
    params = dict(model.named_parameters())
    assert params.keys() == dict(plain.named_parameters()).keys()
    idx, layout = batch_of((20,))
    model(idx, layout=layout).backward()

    stream = stream_of(model)
    slots = {slot.buffer.untyped_storage().data_ptr() for slot in stream.slots}
    on_device = []
    for number, block in enumerate(stream.blocks):
        storages = {param.untyped_storage().data_ptr() for param in block.params}
        assert len(storages) == 1  # one copy for all of a block
        if storages <= slots:
            on_device.append(number)
        else:
            assert storages == {block.buffer.untyped_storage().data_ptr()}
    assert on_device == [0, 1] and params == dict(model.named_parameters())
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert stream.device_bytes == 2 * stream.blocks[0].buffer.numel()


def test_no_block_is_in_memory_twice_for_longer_than_its_copy_takes() -> None:
    """Streaming a model of 12 blocks takes the memory of one more block, and in the end that of two slots."""
    setup = replace(BASE, config=SMALL.replace(n_layer=12))
    model = build_model(setup.config)
    fill_with_zeros(model, setup)
    ledger = Ledger()
    enter_model(model, ledger)
    before = ledger.alive
    with ledger:
        stream_blocks(model, torch.device("cpu"))
    stream = stream_of(model)
    block = stream.blocks[0].buffer.numel()
    assert ledger.peak - before <= 2 * block and ledger.alive - before == stream.device_bytes


def test_after_an_exception_all_goes_on() -> None:
    """Out of memory in the middle of a block, forward or backward: the next pass is right."""
    plain, model = (trained_model(BASE, stream=stream) for stream in (False, True))
    idx, layout = batch_of((20, 11))

    def fail(*_: Any) -> None:
        raise MemoryError

    for number, when in ((3, "forward"), (1, "backward"), (0, "backward")):
        block = model.transformer.h[number]
        if when == "forward":
            handle = block.mlp.register_forward_pre_hook(fail)
        else:
            handle = block.attn.q.lora_A.register_hook(fail)
        with pytest.raises(MemoryError):
            model(idx, layout=layout).backward()
        handle.remove()
        model.zero_grad()
        plain.zero_grad()
        plain(idx, layout=layout).backward()
        model(idx, layout=layout).backward()
        for name, param in trained(plain).items():
            assert torch.equal(trained(model)[name].grad, param.grad), (number, when, name)


def test_compiled_blocks_are_streamed(monkeypatch) -> None:
    """They compute what streamed blocks do that are not compiled; none is compiled anew in another slot."""
    from torch._dynamo.utils import counters

    # without code for a CPU, which takes 10 s to make
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    setup = replace(BASE, quantize="bnb.nf4")
    plain = trained_model(setup, stream=True)
    model = trained_model(setup, stream=True, compiled=True)
    graphs = []
    for lengths in ((30, 9), (12, 25)):
        idx, layout = batch_of(lengths)
        plain(idx, layout=layout).backward()
        model(idx, layout=layout).backward()
        graphs.append(counters["stats"]["unique_graphs"])
        for name, param in trained(plain).items():
            assert torch.allclose(trained(model)[name].grad, param.grad, rtol=1e-4, atol=1e-5), name
    assert graphs[1] == graphs[0]


# ---- loading


def test_blocks_go_to_the_host_and_all_else_stays_on_the_device() -> None:
    """A tensor that was read to a GPU does not stay there, if it is of a block; its bias may still be to come."""
    model = build_model(GPT_2)
    with FakeTensorMode(allow_non_fake_inputs=True):  # which has tensors on a GPU that is not there
        for name in ("transformer.h.0.norm_1.weight", "transformer.h.0.attn.q.weight", "transformer.wte.weight"):
            weight = torch.empty(parameter_shapes(GPT_2)[name], device="cuda")
            replace_parameter(model, name, weight, torch.float32, on_host="transformer.h" in name)
    block = model.transformer.h[0]
    assert block.norm_1.weight.device.type == block.attn.q.weight.device.type == "cpu"
    assert block.attn.q.bias.is_meta and model.transformer.wte.weight.device.type == "cuda"


def test_loading_for_streams_gives_the_same_model(tiny_dir: Path) -> None:
    models = []
    for blocks_on_host in (False, True):
        model = build_model(Config.from_checkpoint(tiny_dir))
        quantize_linears(model, "bnb.nf4-dq")
        fingerprint = load_weights(model, tiny_dir, torch.bfloat16, torch.device("cpu"), blocks_on_host=blocks_on_host)
        models.append((fingerprint, model.state_dict()))
    assert models[0][0] == models[1][0]
    assert all(torch.equal(models[0][1][name], value) for name, value in models[1][1].items())


# ---- the scripts


TRAIN = TrainArgs(learning_rate=0.01, global_batch_size=4, micro_batch_size=2, max_steps=2, eval_interval=1)


@pytest.mark.parametrize("method", ["lora", "adapter_v2"])
def test_runs_learn_the_same(method: str, tiny_dir: Path, tmp_path: Path) -> None:
    """By their scripts, with answers before, in between and after; the settings say so."""
    write_data(tmp_path / "data", tiny_dir)
    main = script(f"finetune/{method}.py").main
    settings = dict(checkpoint_dir=tiny_dir, data_dir=tmp_path / "data", n_answers=1, quantize="bnb.nf4", train=TRAIN)
    if method == "adapter_v2":
        settings["adapter"] = ADAPTER
    main(**settings, out_dir=tmp_path / "plain", activation_checkpointing="block")
    main(**settings, out_dir=tmp_path / "streamed", stream_blocks=True)
    assert rows_of(tmp_path / "streamed") == rows_of(tmp_path / "plain")
    files = [tmp_path / run / "best" / f"{method}.safetensors" for run in ("plain", "streamed")]
    plain, streamed = map(load_file, files)
    assert plain.keys() == streamed.keys() and all(torch.equal(plain[name], streamed[name]) for name in plain)
    assert "stream_blocks: true" in (tmp_path / "streamed/hyperparameters.yaml").read_text()

    # what it has learned answers the same with its base on the host
    streamed_model, _, _ = load_for_use(
        UseArgs(finetuned=tmp_path / "streamed", stream_blocks=True), torch.device("cpu")
    )
    resident_model, _ = load_finetuned(None, tmp_path / "streamed")
    assert stream_of(streamed_model) is not None and stream_of(resident_model) is None
    logits = [cached(model, torch.arange(12)[None], [8, 1, 3]) for model in (streamed_model, resident_model)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 2}, "--stream_blocks is for one device, but there are 2, .* --strategy fsdp splits the weights"),
        ({"strategy": "fsdp"}, "--stream_blocks is for one device"),
        ({"activation_checkpointing": "selective"}, "every block again .* is selective. Leave one of them out."),
    ],
)
def test_flags_that_contradict_it_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_streaming(LaunchArgs(**settings))


def test_refused_before_a_weight_is_read(tmp_path: Path, tiny_dir: Path) -> None:
    main = script("finetune/lora.py").main
    with pytest.raises(InputError, match="--stream_blocks is for one device"):
        main(checkpoint_dir=tiny_dir, data_dir=tmp_path, out_dir=tmp_path / "out", stream_blocks=True, devices=2)
    assert not (tmp_path / "out").exists()


def test_it_is_one_device_under_torchrun_too(monkeypatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="for one device, but there are 2"):
        check_streaming(LaunchArgs())
