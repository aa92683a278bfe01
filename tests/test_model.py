"""The model equals transformers', and itself computed another way: `pytest tests/test_model.py`, about 20 s"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.models import cached, edit_config, error, make_checkpoint, make_record, reference, small_gpt
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt import GPT, Config, InputError, families
from lit_gpt.checkpoint.load import load_model
from lit_gpt.generate.decode import generate
from lit_gpt.model import KVCache
from lit_gpt.model.embeddings import ScaledEmbedding
from lit_gpt.model.loss import LOGITS
from lit_gpt.model.norms import RMSNorm
from lit_gpt.model.packing import Layout, Segment
from lit_gpt.model.rope import Rope, apply_rope, apply_spread_rope

LINEAR = dict(rope_type="linear", factor=2.5)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CASES = {
    "gqa": {},
    "mha": dict(num_key_value_heads=6),
    "mqa": dict(num_key_value_heads=1),
    "head_dim": dict(head_dim=16),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "eps": dict(rms_norm_eps=0.03),
    "rope_base": dict(rope_parameters=dict(rope_type="default", rope_theta=700.0)),
    "linear": dict(rope_parameters=LINEAR | dict(rope_theta=700.0)),
    "llama3": dict(rope_parameters=LLAMA3 | dict(rope_theta=5000.0)),
    "rope_base of transformers 4": dict(rope_theta=700.0, rope_scaling=None),
    "linear of transformers 4": dict(rope_theta=700.0, rope_scaling={"type": "linear", "factor": 2.5}),
    "llama3 of transformers 4": dict(rope_theta=5000.0, rope_scaling=LLAMA3),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.replace(" ", "_"))
def pair(request, tmp_path_factory):
    """(transformers' model, ours) of one checkpoint."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", **CASES[request.param])
    return reference(folder), load_model(folder)


@torch.no_grad()
def test_logits_are_those_of_transformers(pair) -> None:
    theirs, ours = pair
    idx = torch.randint(0, 97, (2, 100), generator=torch.Generator().manual_seed(1))
    expected = theirs(idx).logits
    assert torch.equal(ours.ropes["global"].theta, theirs.model.rotary_emb.inv_freq)
    assert error(ours(idx), expected) < 1e-5
    assert error(cached(ours, idx, [90] + [1] * 10), expected) < 1e-5
    assert error(cached(ours, idx, [40, 1, 33, 1, 25]), expected) < 1e-5


def test_greedy_generation_is_that_of_transformers(pair) -> None:
    theirs, ours = pair
    prompts = torch.randint(0, 97, (8, 5), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(prompts, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert expected[:, 5:].unique().numel() > 10
    for prompt, answer in zip(prompts, expected):
        assert generate(ours, prompt, 25, temperature=0.0).tolist() == answer.tolist()


@torch.no_grad()
def test_the_real_model_is_that_of_transformers(sample_dir) -> None:
    from transformers import AutoTokenizer

    text = "The city of Paris lies on the Seine.\n\n    def area(r):\n        return 3.14159 * r ** 2  # Größe\n" * 4
    idx = AutoTokenizer.from_pretrained(sample_dir)(text, return_tensors="pt")["input_ids"]
    logits, expected = load_model(sample_dir)(idx), reference(sample_dir)(idx).logits
    assert idx.size(1) > 100
    assert (logits - expected).abs().max() < 1e-4


def gradients(model: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


def one_by_one(model: GPT, records: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The summed loss from plain logits, a record at a time."""
    loss = 0.0
    for ids, trained in records:
        target = ids[1:].masked_fill(~trained[1:], -100)
        loss = loss + F.cross_entropy(model(ids[None])[0, :-1], target, ignore_index=-100, reduction="sum")
    return loss


def mismatch(model: GPT, loss: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst error of the loss and of every gradient."""
    got, wanted = gradients(model, loss), gradients(model, expected)
    return max(error(loss, expected), *(error(got[name], wanted[name]) for name in wanted))


@pytest.mark.parametrize("head_trained", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_records_end_to_end_equal_separate_ones(tied, head_trained, shared, monkeypatch) -> None:
    model = small_gpt(tie_embeddings=tied)
    model.lm_head.weight.requires_grad_(head_trained)
    # without targets, a single token (trained or not), all trained, more targets than a chunk holds
    monkeypatch.setitem(LOGITS, torch.float64, 128 * model.config.padded_vocab_size)
    sizes = [(7, 0), (1, 0), (1, 1), (5, 5), (30, 11), (256, 216), (12, 1)]
    records = [make_record(length, n, (7, 7, 7)[: length - 1]) for length, n in sizes]
    idx, layout = Layout.end_to_end(records, share_prefixes=shared)
    n_targets = 4 + 11 + 216 + 1
    assert layout.n_targets == n_targets and any(s.prefix_length for s in layout.segments) == shared

    loss, expected = model(idx, layout=layout), one_by_one(model, records)
    assert mismatch(model, loss / 7, expected / 7) < 1e-10
    assert mismatch(model, model(idx, layout=layout) / n_targets, one_by_one(model, records) / n_targets) < 1e-10
    with torch.no_grad():
        assert error(model(idx, layout=layout), expected) < 1e-10


def test_every_mistake_would_be_seen() -> None:
    """The same comparison, with a layout that is wrong in one place."""
    model = small_gpt()
    records = [make_record(9, 4), make_record(6, 2), make_record(8, 8)]
    idx, right = Layout.end_to_end(records)
    worst = lambda layout: mismatch(model, model(idx, layout=layout), one_by_one(model, records))  # noqa: E731
    assert right.n_targets == 13 and worst(right) < 1e-10
    wrong = {
        "two records seen as one": replace(right, segments=(Segment(0, 15), Segment(15, 8))),
        "a position": replace(right, pos=right.pos + (torch.arange(23) == 10)),
        "another target": replace(right, target=(right.target + (torch.arange(13) == 3)) % 50),
        "one target less": replace(right, target_index=right.target_index[1:], target=right.target[1:]),
        "predicted by the next token": replace(right, target_index=right.target_index + 1),
    }  # fmt: skip
    for mistake, layout in wrong.items():
        assert worst(layout) > 1e-4, mistake
    loss, expected = model(idx, layout=right) / (right.n_targets + 1), one_by_one(model, records) / right.n_targets
    assert mismatch(model, loss, expected) > 1e-4


def test_a_prefix_is_continued() -> None:
    """Two answers to one question, laid out by hand: the question is computed once."""
    model = small_gpt()
    question, *answers = torch.randint(0, 50, (6,)), torch.randint(0, 50, (4,)), torch.randint(0, 50, (9,))
    layout = Layout(
        pos=torch.cat((torch.arange(6), torch.arange(6, 10), torch.arange(6, 15))),
        target_index=torch.tensor([5, *range(6, 9), 5, *range(10, 18)]),  # both first words follow the question's last
        target=torch.cat(answers),
        segments=(Segment(0, 6), Segment(6, 4, 0, 6), Segment(10, 9, 0, 6)),
    )
    loss = model(torch.cat((question, *answers))[None], layout=layout)
    records = [(torch.cat((question, a)), torch.arange(6 + len(a)) >= 6) for a in answers]
    assert mismatch(model, loss, one_by_one(model, records)) < 1e-10


def test_no_targets_is_a_loss_of_zero_that_every_parameter_can_be_asked_for() -> None:
    model = small_gpt()
    idx, layout = Layout.end_to_end([make_record(5, 0), make_record(3, 0)])
    loss = model(idx, layout=layout)
    assert loss.item() == 0
    assert all(not grad.any() for grad in gradients(model, loss).values())
    with torch.no_grad():
        assert model(idx, layout=layout) == 0


def test_block_size_bounds_a_record_not_the_row() -> None:
    model = small_gpt(block_size=16)
    idx, layout = Layout.end_to_end([make_record(16, 3) for _ in range(5)])
    assert idx.size(1) == 80 and model(idx, layout=layout).isfinite()
    for lengths, shared in [([4, 17], False), ([17, 17], True)]:
        idx, layout = Layout.end_to_end([make_record(n, 1, start=(1, 2, 3)) for n in lengths], share_prefixes=shared)
        with pytest.raises(ValueError, match="record of 17 tokens.*16"):
            model(idx, layout=layout)


def test_lengths_and_a_missing_cache_are_refused() -> None:
    model = small_gpt(block_size=16)
    with pytest.raises(ValueError, match="17 tokens.*16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="17 tokens.*16"):
        model.max_seq_length = 17
    with pytest.raises(ValueError, match="set_kv_cache"):
        model(torch.zeros(1, 3, dtype=torch.long), torch.arange(3))
    model.max_seq_length = 8
    model.set_kv_cache(batch_size=1)
    assert model.kv_cache.layers[0].keys.shape == (1, 2, 8, 8)  # as long as asked for, and no longer
    model.max_seq_length = 16
    with pytest.raises(ValueError, match="9 tokens.*8"):
        model(torch.zeros(1, 9, dtype=torch.long), torch.arange(9))
    with pytest.raises(ValueError, match="2 rows.*cache of 1"):
        model(torch.zeros(2, 3, dtype=torch.long), torch.arange(3))
    with pytest.raises(ValueError, match="17 tokens.*16"):
        model.new_kv_cache(batch_size=1, max_seq_length=17)


@torch.no_grad()
def test_a_cache_belongs_to_its_texts_and_not_to_the_model() -> None:
    """Two batches of texts, read in turns into a cache each, and a third one into the cache that the model keeps."""
    model = small_gpt(sliding_window=5)
    texts = torch.randint(0, 50, (3, 2, 12))
    model.max_seq_length = 20
    model.set_kv_cache(batch_size=2)
    caches = [model.new_kv_cache(2, 12), KVCache(model.config, 2, 15, dtype=torch.float64), None]
    logits = [[], [], []]
    for pos in torch.arange(12).split([7, 1, 3, 1]):
        for text, cache, parts in zip(texts, caches, logits, strict=True):
            parts.append(model(text[:, pos], pos, cache=cache))
    for text, parts in zip(texts, logits, strict=True):
        assert error(torch.cat(parts, dim=1), model(text)) < 1e-10
    assert {name.rsplit(".", 1)[-1] for name, _ in model.named_buffers()} == {"theta"}


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_transformers_far_from_the_start(tmp_path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", max_position_embeddings=2048)
    idx = torch.randint(0, 97, (1, 2000), generator=torch.Generator().manual_seed(1))
    exact = reference(folder)(idx).logits
    far = lambda logits: (logits.float() - exact)[:, 1000:].square().mean().sqrt().item()  # noqa: E731
    model = load_model(folder, dtype=torch.bfloat16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16} and model.ropes[
        "global"
    ].theta.dtype == torch.float32
    ours, theirs = far(model(idx)), far(reference(folder, torch.bfloat16)(idx).logits)
    assert 0 < ours < 1.5 * theirs
    model.ropes["global"].theta = model.ropes["global"].theta.bfloat16()  # what a cast of the built model would do
    assert far(model(idx)) > 3 * theirs


@torch.no_grad()
def test_a_bfloat16_norm_and_rotation_round_once() -> None:
    x = torch.randn(1, 2, 50, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    norm = RMSNorm(48)
    torch.nn.init.normal_(norm.weight.data, mean=1.0)
    wide = RMSNorm(48)
    norm.bfloat16()
    wide.weight.copy_(norm.weight)
    assert torch.equal(norm(x), wide(x.float()).bfloat16())
    cos, sin = Rope(Config(n_embd=48, n_head=1))(torch.arange(1000, 1050), [])
    turned = apply_spread_rope(x, cos, sin)
    assert torch.equal(turned, apply_spread_rope(x.float(), cos, sin).bfloat16())
    assert torch.equal(turned, apply_rope(x, cos[:, :24], sin[:, 24:]))  # of pairs: the second half is sin


SCALES = (2048**0.5, 12.0, 0.1)  # Gemma's and Granite's, and one that no dtype has


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_a_scaled_embedding_has_the_bits_of_a_factor_of_its_dtype(scale: float, dtype: torch.dtype) -> None:
    """Vectors and gradients, as if the factor were a tensor."""
    embedding = ScaledEmbedding(Config(vocab_size=97, n_embd=48, n_head=1, embedding_scale=scale)).to(dtype)
    idx = torch.arange(97)[None]
    found = embedding(idx)
    expected = F.embedding(idx, embedding.weight) * torch.tensor(scale, dtype=dtype)
    assert found.dtype == dtype and torch.equal(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = [torch.autograd.grad(x, embedding.weight, weights)[0] for x in (found, expected)]
    assert torch.equal(*gradients)


class CopiesFromTheCPU(TorchDispatchMode):
    """Counts the tensors that are copied from the CPU to the device meta, for which a GPU would have to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.n += args[0].device.type == "cpu" and result.device.type == "meta"
        return result


def test_what_waits_for_the_cpu_in_a_forward_pass() -> None:
    """No factor of the embedding, and one copy of frequencies for all records that have their own."""
    scaled = ScaledEmbedding(Config(n_embd=48, n_head=1, embedding_scale=12.0)).to("meta")
    dynamic = Rope(Config(n_embd=48, n_head=1, rope_scaling=DYNAMIC)).to("meta")
    with CopiesFromTheCPU() as copies:
        scaled(torch.zeros(1, 5, dtype=torch.int64, device="meta"))
    assert copies.n == 0
    with CopiesFromTheCPU() as copies:
        cos, _ = dynamic(torch.arange(90, device="meta"), [(20, 20), (30, 30), (40, 40)])
    assert copies.n == 1 and cos.shape == (90, 48)


DYNAMIC = dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=32)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0 + i / 9 for i in range(24)],
    long_factor=[1.0 + i / 3 for i in range(24)],
    original_max_position_embeddings=32,
)


@pytest.mark.parametrize("scaling", [DYNAMIC, LONGROPE], ids=lambda scaling: scaling["rope_type"])
def test_each_record_is_turned_by_the_frequencies_of_its_length(scaling: dict) -> None:
    rope = Rope(Config(n_embd=48, n_head=1, rope_scaling=scaling))
    lengths = [20, 50, 33, 70, 50]
    pos = torch.cat([torch.arange(length) for length in lengths])
    found = rope(pos, [(length, length) for length in lengths])
    alone = [rope(torch.arange(length), [(length, length)]) for length in lengths]
    for together, parts in zip(found, zip(*alone)):
        assert torch.equal(together, torch.cat(parts))
    theta, factor = rope.frequencies(70)
    cos = torch.outer(torch.arange(70.0), theta).cos() * factor
    assert torch.equal(alone[3][0], torch.cat((cos, cos), dim=-1))
    assert not torch.equal(alone[3][0][:20], alone[0][0]), "longer than the original context"


def test_known_names() -> None:
    config = Config.from_name("TinyLlama-1.1B-Chat-v1.0", n_layer=3)
    assert (config.n_layer, config.n_query_groups, config.head_size, config.vocab_size) == (3, 4, 64, 32000)
    assert Config.from_name("TinyLlama/TinyLlama-1.1B-Chat-v1.0", n_layer=3) == config
    assert GPT.from_name("SmolLM2-135M", n_layer=1).transformer.wte.weight.shape == (49152, 576)
    with pytest.raises(InputError, match="'TinyLama-1.1B'.*TinyLlama-1.1B-Chat-v1.0"):
        Config.from_name("TinyLama-1.1B")


def test_the_table_of_names_agrees_with_the_real_file(sample_dir) -> None:
    assert Config.from_name("SmolLM2-135M") == Config.from_checkpoint(sample_dir, name="SmolLM2-135M")


@pytest.mark.parametrize("name", families.load("llama").MODELS)
def test_frequencies_of_published_models_are_those_of_transformers(name) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = Config.from_name(name)
    rope = (config.rope_scaling or dict(rope_type="default")) | dict(rope_theta=float(config.rope_base))
    theirs = LlamaConfig(head_dim=config.head_size, max_position_embeddings=config.block_size, rope_parameters=rope)
    assert torch.equal(Rope(config).theta, LlamaRotaryEmbedding(theirs).inv_freq)


@pytest.mark.parametrize("case", ["head_dim", "attention_bias", "tied", "llama3"])
def test_a_saved_config_is_read_back(case, tmp_path) -> None:
    config = Config.from_checkpoint(make_checkpoint(tmp_path / "checkpoint", **CASES[case]))
    (tmp_path / "saved").mkdir()
    config.save(tmp_path / "saved")
    assert Config.from_checkpoint(tmp_path / "saved") == config
    assert Config.from_checkpoint(tmp_path / "saved", block_size=7) == config.replace(block_size=7) != config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "config.json: it says model_type 'mamba'; known are .*llama"),
        ({"model_type": None}, "config.json: it says model_type None; known are .*llama"),
        ({"num_hidden_layers": None}, "config.json has no 'num_hidden_layers'.*Copy or download it again"),
        ({"rope_parameters": {"rope_type": "xpos", "factor": 2.0}}, "config.json.*'xpos'.*known are default, linear"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json has no 'factor'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
        ({"hidden_act": "swiglu"}, "config.json.*'swiglu'.*silu"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6, which num_key_value_heads, 4, does not divide"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_work_says_why(changes, message, tmp_path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    edit_config(folder, changes)
    with pytest.raises(InputError, match=message):
        Config.from_checkpoint(folder)


def packages_loaded_by(code: str) -> set[str]:
    """The top-level packages that a new Python has imported after this code."""
    code += "; import sys; print(sorted({name.split('.')[0] for name in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return set(eval(out))


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = packages_loaded_by("import lit_gpt")
    assert "torch" in loaded
    assert not loaded & {"lightning_fabric", "bitsandbytes", "transformers", "jsonargparse", "matplotlib", "gguf"}


def test_fabric_comes_without_what_it_would_import() -> None:
    """torchmetrics, which is installed with Lightning, would take seconds of each start."""
    loaded = packages_loaded_by("from lit_gpt.distributed import launch; launch()")
    assert "lightning_fabric" in loaded
    assert not loaded & {"torchmetrics", "lightning", "pytorch_lightning", "transformers", "matplotlib", "scipy"}


def test_an_expert_without_tokens_has_a_gradient() -> None:
    """It is zero: DDP would wait for one for ever, and AdamW leaves out a parameter that has none."""
    moe = small_gpt(mlp="LLaMAMoE", n_expert=6, n_expert_per_token=1, moe_intermediate_size=8).transformer.h[0].mlp
    moe(torch.ones(1, 1, 32, dtype=torch.float64)).sum().backward()
    gradients = [param.grad for param in moe.experts.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) == len(gradients) // 6
