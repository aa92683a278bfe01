"""Every family equals transformers', in and out, on tiny random models: `pytest tests/test_families.py`, about 90 s"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.families import CASES, COMMON, DYNAMIC, WINDOWS, YARN, make, tokens
from helpers.models import cached, edit_config, error, reference
from helpers.tiny_tokenizers import SPECIAL, TEXTS, byte_level, metaspace, write
from safetensors.torch import load_file

from lit_gpt import Config, InputError, Tokenizer, families
from lit_gpt.checkpoint.load import build_model, load_model
from lit_gpt.checkpoint.save import convert_checkpoint
from lit_gpt.checkpoint.tensor_names import hf_name
from lit_gpt.generate.decode import generate
from lit_gpt.model.gpt import count_parameters
from lit_gpt.model.packing import Layout
from lit_gpt.model.rope import rotates_by_length


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.replace(" ", "_"))
def folder(request, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("family") / "checkpoint", *CASES[request.param])


@pytest.fixture(scope="module")
def pair(folder):
    """(transformers' model, ours) of one checkpoint."""
    return reference(folder), load_model(folder)


@torch.no_grad()
def test_logits_are_those_of_transformers(pair) -> None:
    """On 100 tokens: beyond the sliding windows, and beyond the lengths that rotations were made for."""
    theirs, ours = pair
    idx = tokens(2, 100)
    expected = theirs(idx).logits
    assert error(ours(idx), expected) < 1e-5
    assert error(cached(ours, idx, [40, 1, 33, 1, 25]), expected) < 1e-5


@torch.no_grad()
def test_short_texts_too(pair) -> None:
    """Before any of that begins."""
    theirs, ours = pair
    assert error(ours(tokens(1, 15)), theirs(tokens(1, 15)).logits) < 1e-5


def test_greedy_generation_is_that_of_transformers(pair) -> None:
    theirs, ours = pair
    for prompt in tokens(4, 5):
        expected = theirs.generate(prompt[None], max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
        assert generate(ours, prompt, 25, temperature=0.0).tolist() == expected.tolist()


@pytest.mark.parametrize("case", ["phi3, longrope", "phi3, longrope of a part", "llama, dynamic"])
def test_generation_beyond_the_length_that_rotations_were_made_for(case, tmp_path) -> None:
    """Greedy tokens are those of the whole text without a cache; dynamic's only up to there."""
    folder = make(tmp_path / "checkpoint", *CASES[case])
    theirs, ours = reference(folder), load_model(folder)
    for prompt in tokens(2, 20):
        text = prompt
        with torch.no_grad():
            while len(text) < 110:
                text = torch.cat((text, ours(text[None])[0, -1:].argmax(-1)))
        n = 40 if "dynamic" in case else 110
        assert generate(ours, prompt, 110, temperature=0.0)[:n].equal(text[:n])
        expected = theirs.generate(prompt[None], max_new_tokens=n - 20, do_sample=False, pad_token_id=0)[0]
        assert expected.equal(text[:n])


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_records_end_to_end_are_separate_records(share_prefixes, pair) -> None:
    """Loss and gradients; also where a window ends within a shared prefix. In float64."""
    _, ours = pair
    share_prefixes &= not rotates_by_length(ours)
    model = build_model(ours.config).to_empty(device="cpu")
    model.load_state_dict(ours.state_dict())
    for rope in model.ropes:
        model.ropes[rope].theta = ours.ropes[rope].theta
    model = model.double().requires_grad_()
    shared = tokens(1, 25)[0]
    records = [torch.cat((shared, tail)) for tail in tokens(3, 7)] + [tokens(1, 70)[0], tokens(1, 4)[0]]
    trained = [torch.arange(len(ids)) % 3 != 1 for ids in records]

    def gradients(batches) -> list[torch.Tensor]:
        model.zero_grad()
        loss = sum(model(idx, layout=layout) for idx, layout in batches)
        loss.backward()
        return [loss.detach(), *(param.grad.clone() for param in model.parameters() if param.grad is not None)]

    together = Layout.end_to_end(list(zip(records, trained)), share_prefixes)
    assert (together[0].numel() < sum(map(len, records))) == share_prefixes
    alone = [Layout.end_to_end([record]) for record in zip(records, trained)]
    for got, expected in zip(gradients([together]), gradients(alone), strict=True):
        assert error(got, expected) < 1e-10 or expected.abs().max() < 1e-12


def test_there_and_back(folder, tmp_path) -> None:
    """Every tensor of the checkpoint bit by bit, and transformers loads it."""
    convert_checkpoint(folder, tmp_path / "lit", hugging_face=False)
    convert_checkpoint(tmp_path / "lit", tmp_path / "hf", hugging_face=True)
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    converted, source = load_model(tmp_path / "lit"), load_model(folder)
    assert converted.config.replace(name="") == source.config.replace(name="")
    for (name, a), b in zip(converted.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(reference(tmp_path / "hf")(tokens(1, 9)).logits, reference(folder)(tokens(1, 9)).logits)


@torch.no_grad()
def test_what_was_saved_without_its_head(folder, tmp_path) -> None:
    """As the model below the head is saved, such as Qwen3-Embedding: no name has the prefix of the whole."""
    import transformers

    whole = reference(folder)
    bare = whole.base_model
    if not whole.config.tie_word_embeddings:
        bare.config.tie_word_embeddings = True
    bare.save_pretrained(tmp_path / "bare")
    if whole.config.model_type == "phi":  # its head has a bias
        with pytest.raises(InputError, match="lm_head.bias is missing"):
            load_model(tmp_path / "bare")
        return
    expected = reference(tmp_path / "bare")(tokens(1, 15)).logits
    assert error(load_model(tmp_path / "bare")(tokens(1, 15)), expected) < 1e-5

    # a copy is the whole model, and says so
    convert_checkpoint(tmp_path / "bare", tmp_path / "copy", hugging_face=True)
    hf = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert hf["architectures"] == [type(whole).__name__] and hasattr(transformers, hf["architectures"][0])
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() <= load_file(folder / "model.safetensors").keys()
    assert torch.equal(reference(tmp_path / "copy")(tokens(1, 15)).logits, expected)


@torch.no_grad()
def test_bfloat16_is_as_good_as_transformers(folder, pair) -> None:
    """The error of bfloat16 weights is of the size of theirs: norms and rotations are done in float32."""
    exact, idx = pair[1](tokens(1, 60)), tokens(1, 60)
    theirs = reference(folder, torch.bfloat16)(idx).logits.float()
    ours = load_model(folder, torch.bfloat16)(idx).float()
    errors = [(logits - exact).square().mean().sqrt() / exact.square().mean().sqrt() for logits in (ours, theirs)]
    assert 0 < errors[0] < max(1.25 * errors[1], 0.01)


# ---- the tables


@pytest.mark.parametrize("family", families.FAMILIES)
def test_published_names(family) -> None:
    """Each builds; its sizes are what its own name says."""
    for repo, sizes in families.load(family).MODELS.items():
        config = Config.from_name(repo)
        assert config.family == family and config == Config.from_name(repo.split("/")[1])
        if config.n_expert > 8:  # thousands of small modules: that of the same family which is small will do
            continue
        n = sum(param.numel() for param in build_model(config).parameters())
        assert 5e6 < n < 5e11, repo
        assert all(hf_name(name, config) for name in build_model(config).state_dict())
        assert sizes


PUBLISHED = {  # parameters, as their authors count them
    "meta-llama/Llama-2-7b-hf": 6738415616,
    "meta-llama/Llama-2-13b-hf": 13015864320,
    "meta-llama/Llama-2-70b-hf": 68976648192,
    "meta-llama/Llama-3.1-8B": 8030261248,
    "meta-llama/Llama-3.1-70B": 70553706496,
    "meta-llama/Llama-3.1-405B": 405853388800,
    "meta-llama/Llama-3.2-1B": 1235814400,
    "meta-llama/Llama-3.2-3B": 3212749824,
    "codellama/CodeLlama-7b-hf": 6738546688,
    "codellama/CodeLlama-34b-hf": 33743970304,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1100048384,
    "HuggingFaceTB/SmolLM2-1.7B": 1711376384,
    "openlm-research/open_llama_3b": 3426473600,
    "mistralai/Mistral-7B-v0.1": 7241732096,
    "mistralai/Mixtral-8x7B-v0.1": 46702792704,
    "mistralai/Mixtral-8x22B-v0.1": 140620634112,
    "Qwen/Qwen2-0.5B": 494032768,
    "Qwen/Qwen2.5-7B": 7615616512,
    "Qwen/Qwen3-8B": 8190735360,
    "google/gemma-7b": 8537680896,
    "google/gemma-2-9b": 9241705984,
    "google/gemma-3-1b-pt": 999885952,
    "microsoft/phi-2": 2779683840,
    "microsoft/Phi-3-mini-4k-instruct": 3821079552,
    "microsoft/Phi-3.5-mini-instruct": 3821079552,
    "EleutherAI/pythia-1b": 1011781632,
    "tiiuae/falcon-7b": 6921720704,
    "openai-community/gpt2": 124439808,
    "stabilityai/stablelm-3b-4e1t": 2795443200,
    "microsoft/phi-4": 14659507200,
    "allenai/OLMo-2-1124-7B": 7298617344,
    "bigcode/starcoder2-3b": 3030371328,
    "bigcode/starcoder2-7b": 7173923840,
    "bigcode/starcoder2-15b": 15957889024,
    "HuggingFaceTB/SmolLM3-3B": 3075098624,
}


@pytest.mark.parametrize("repo", PUBLISHED)
def test_number_of_parameters(repo) -> None:
    assert count_parameters(Config.from_name(repo)) == PUBLISHED[repo]


def test_parameters_are_counted_as_if_built(folder) -> None:
    """The count builds no more than one layer of each kind."""
    config = Config.from_checkpoint(folder)
    assert count_parameters(config) == sum(param.numel() for param in build_model(config).parameters())


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        (dict(max_position_embeddings=4096, max_sequence_length=16384), 16384),  # vicuna-7b-v1.5-16k
        (dict(max_position_embeddings=4096, max_sequence_length=2048), 4096),
        (  # Qwen 2.5's model cards
            dict(
                max_position_embeddings=32768,
                rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32768),
            ),
            131072,
        ),
        (
            dict(
                max_position_embeddings=131072,
                rope_scaling=dict(type="yarn", factor=2.0, original_max_position_embeddings=32768),
            ),
            131072,
        ),
        (dict(max_position_embeddings=2048, rope_scaling=dict(type="dynamic", factor=4.0)), 8192),
    ],
)
def test_the_longest_record(changes, length, tmp_path) -> None:
    hf = dict(COMMON, model_type="qwen2", rms_norm_eps=1e-6) | changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert Config.from_checkpoint(tmp_path).block_size == length


def test_longchat_says_less_than_it_is(tmp_path, monkeypatch) -> None:
    """Its config.json does not mention that positions are condensed: its name does."""
    for name in ("longchat-7b-16k", "some-llama"):
        (tmp_path / name).mkdir()
        hf = dict(COMMON, model_type="llama", rms_norm_eps=1e-6, max_position_embeddings=2048)
        (tmp_path / name / "config.json").write_text(json.dumps(hf))
    assert Config.from_checkpoint(tmp_path / "some-llama").rope_scaling is None
    longchat = Config.from_checkpoint(tmp_path / "longchat-7b-16k")
    assert longchat.rope_scaling == dict(rope_type="linear", factor=8.0) and longchat.block_size == 16384
    monkeypatch.chdir(tmp_path / "longchat-7b-16k")
    for here in (".", "../longchat-7b-16k"):
        assert Config.from_checkpoint(Path(here)).replace(name="") == longchat.replace(name="")


@torch.no_grad()
def test_longchat_is_llama_with_condensed_positions(tmp_path) -> None:
    folder = make(tmp_path / "longchat-7b-16k", *CASES["llama"])
    shutil.copytree(folder, tmp_path / "theirs")
    edit_config(tmp_path / "theirs", dict(rope_parameters=dict(rope_type="linear", factor=8.0, rope_theta=10000.0)))
    expected = reference(tmp_path / "theirs")(tokens(1, 100)).logits
    assert error(load_model(folder)(tokens(1, 100)), expected) < 1e-5
    assert error(reference(folder)(tokens(1, 100)).logits, expected) > 0.01


def test_any_of_several_stop_tokens_ends_an_answer(tmp_path) -> None:
    """In a vocabulary that is padded beyond the tokenizer's."""
    folder = make(tmp_path / "checkpoint", "Llama", COMMON | dict(vocab_size=320))
    write(folder, tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL)
    theirs, ours = reference(folder), load_model(folder)
    free = generate(ours, tokens(5), 60, temperature=0.0)[5:].tolist()
    first, second = free[7], free[19]
    for stop in ([first, second], [second, 319], [319]):
        write(folder, generation_config_json={"eos_token_id": stop})
        expected = reference(folder).generate(tokens(1, 5), max_new_tokens=55, do_sample=False, pad_token_id=0)[0]
        got = generate(ours, tokens(5), 60, temperature=0.0, eos_id=Tokenizer(folder).stop_ids)
        assert got.tolist() == expected.tolist()
    assert theirs.config.vocab_size > len(Tokenizer(folder).decode(list(range(5)))) and len(got) <= 60


def test_transformers_reads_an_exported_tokenizer_with_spaces_as_pieces(tmp_path) -> None:
    from transformers import AutoTokenizer

    folder = make(tmp_path / "checkpoint", "Llama", COMMON | dict(vocab_size=512))
    settings = SPECIAL | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write(folder, tokenizer_config_json=settings, tokenizer_json=metaspace())
    convert_checkpoint(folder, tmp_path / "lit", hugging_face=False)
    convert_checkpoint(tmp_path / "lit", tmp_path / "hf", hugging_face=True)
    ours, theirs, before = Tokenizer(folder), *map(AutoTokenizer.from_pretrained, (tmp_path / "hf", folder))
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == before(text, add_special_tokens=False).input_ids == ours.encode(text, bos=False).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="bloom"), "model_type 'bloom'; known are RefinedWeb"),
        (dict(hidden_size="big"), "hidden_size is 'big', expected a whole number"),
        (dict(hidden_act="swiglu"), "activation 'swiglu' is not known; known are silu"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "has no 'short_factor'"),
        (dict(model_type="falcon", alibi=True), "alibi is not known"),
        (dict(model_type="gemma3", text_config={"hidden_size": 48}), "Only those of text alone can be used"),
        (dict(num_attention_heads=True), "num_attention_heads is True, expected a whole number"),
        (dict(layer_types=["chunked_attention"] * 3, model_type="mistral"), "'chunked_attention'; known are"),
    ],
)
def test_what_is_not_known_is_named(changes, message, tmp_path) -> None:
    hf = dict(COMMON, model_type="llama", rms_norm_eps=1e-6) | changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(InputError, match=message) as caught:
        Config.from_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


LONG = dict(type="longrope", short_factor=[1.0] * 8, long_factor=[1.0] * 8, original_max_position_embeddings=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type=["llama"]), "unhashable type: 'list'"),
        *((dict({key: value}), f"{key} is {value!r}, expected") for value in (-8, 0, "8", True, math.nan, math.inf)
          for key in (
            "vocab_size", "num_attention_heads", "hidden_size", "head_dim", "intermediate_size", "num_hidden_layers",
            "num_key_value_heads", "rope_theta", "max_position_embeddings",
        )),
        *((dict({key: None}), f"{key} is null, expected") for key in (
            "vocab_size", "num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers",
            "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "attention_bias",
        )),
        *((dict({key: value}), f"{key} is {value!r}, expected true or false") for value in (0, 1, "true")
          for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")),
        (dict(vocab_size=97.0), "vocab_size is 97.0, expected a whole number"),
        (dict(hidden_act=3), "hidden_act is 3, expected a name"),
        (dict(num_key_value_heads=4), "num_attention_heads is 6, which num_key_value_heads, 4, does not divide"),
        (dict(head_dim=None, num_attention_heads=7), "hidden_size is 48, which num_attention_heads, 7, does not"),
        (dict(model_type="gpt2", n_embd=48, n_head=5, num_attention_heads=5), "n_embd is 48, which n_head, 5, does"),
        (dict(model_type="gpt2", n_embd=48, n_head=0), "n_head is 0 and num_attention_heads is 6, expected the same"),
        (dict(model_type="falcon", num_attention_heads=0), "num_attention_heads is 0"),
        (dict(model_type="falcon", parallel_attn=False, new_decoder_architecture=True, head_dim=8), "no such Falcon"),
        (dict(model_type="gpt_neox"), "head_dim is 16, expected hidden_size / num_attention_heads"),
        (dict(model_type="mixtral", num_experts=4, num_local_experts=5), "num_local_experts is 5 and num_experts is 4"),
        (dict(rms_norm_eps=-1.0), "rms_norm_eps is -1.0, expected 0 or more"),
        (dict(rms_norm_eps=math.nan), "rms_norm_eps is nan, expected 0 or more"),
        (dict(model_type="phi", partial_rotary_factor=3.0), "3.0 of 16 elements of a head are to be rotated"),
        (dict(model_type="phi", partial_rotary_factor=-1), "partial_rotary_factor is -1"),
        (dict(model_type="phi", partial_rotary_factor=0.125, rope_scaling=DYNAMIC), "2 elements of a head"),
        (dict(partial_rotary_factor=0.5, rope_scaling=DYNAMIC), "a llama model rotates whole heads"),
        (dict(rope_parameters=dict(rope_theta="1e6")), "rope_theta is '1e6', expected a number"),
        (dict(rope_parameters=dict(rope_theta=1e6), rope_scaling=YARN), "rope_scaling and rope_parameters contradict"),
        (dict(rope_parameters=YARN, rope_scaling=YARN | dict(factor=2.0)), "contradict each other"),
        (dict(rope_scaling=YARN | dict(type="linear")), "rope_type 'yarn' and type 'linear', expected the same"),
        (dict(rope_scaling=YARN, original_max_position_embeddings=64), "is 64, and 32 in rope_scaling, expected the"),
        (dict(rope_scaling=dict(full_attention=YARN)), "all layers of a llama model rotate alike"),
        (dict(layer_types=["full_attention"] * 2), "layer_types has 2 entries, expected one for each of 3"),
        (dict(layer_types=[]), "layer_types has 0 entries, expected one for each of 3"),
        (dict(layer_types="full_attention"), "layer_types is 'full_attention', expected a list"),
        (dict(model_type="qwen2", sliding_window=20, layer_types=WINDOWS), "there is no window: sliding_window is 20,"),
        (dict(model_type="mistral", sliding_window=None, layer_types=WINDOWS), "there is no window"),
        (dict(per_layer_config={"0": dict(sliding_window=5)}), "per_layer_config is not known"),
        (dict(text_config=dict(hidden_size=48)), "text_config is not known"),
        (dict(head_dim=15), "1.0 of 15 elements"),
        (dict(rope_scaling="linear"), "rope_scaling is 'linear', expected a mapping"),
        (dict(rope_scaling=dict(type="linear", factor="8")), "factor is '8', expected more than 0"),
        (dict(rope_scaling=dict(type="linear", factor=0)), "factor is 0, expected more than 0"),
        (dict(rope_scaling=dict(type="dynamic", factor=math.inf)), "infinity"),
        (dict(rope_scaling=dict(type="dynamic", factor="2")), "factor is '2'"),
        (dict(rope_scaling=dict(type="yarn", factor="2", original_max_position_embeddings=8)), "factor is '2'"),
        (dict(rope_scaling=dict(type="yarn", factor=4, original_max_position_embeddings=0)), "embeddings is 0"),
        (dict(rope_scaling=LONG | dict(short_factor=["a"] * 8)), "short_factor is 'a'"),
        (dict(rope_scaling=LONG | dict(long_factor=[1.0])), "long_factor has 1 numbers, expected 8"),
        (dict(model_type="granite", logits_scaling=0), "logits_scaling is 0, expected more than 0"),
        (dict(model_type="gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar is 0"),
        (dict(model_type="gemma3_text", sliding_window_pattern=0), "sliding_window_pattern is 0"),
        (dict(model_type="smollm3", no_rope_layer_interval=0), "no_rope_layer_interval is 0"),
        (dict(model_type="smollm3", no_rope_layers=[1]), "no_rope_layers has 1 entries, expected one for each of 3"),
        (dict(model_type="qwen3_moe", **EXPERTS, decoder_sparse_step=0), "decoder_sparse_step is 0"),
        (dict(model_type="qwen3_moe", **EXPERTS | dict(num_experts_per_tok=5)), "5 experts per token of 4"),
        (dict(model_type="mistral", sliding_window=0), "sliding_window is 0"),
        (dict(model_type="mistral", sliding_window=-3), "sliding_window is -3"),
    ],
)  # fmt: skip
def test_a_value_that_no_model_can_have_is_named(changes, message, tmp_path) -> None:
    hf = COMMON | dict(model_type="llama", rms_norm_eps=1e-6, head_dim=16) | changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(InputError, match=f"^{tmp_path}/config.json.*{message}"):
        Config.from_checkpoint(tmp_path)
