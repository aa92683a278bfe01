"""One config.json, read by transformers and by us: are the logits the same?"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.families import make, tokens
from helpers.models import error
from lit_gpt import Config, InputError
from lit_gpt.checkpoint.load import load_model

ONE_OF_EACH = (  # of the cases in families.py, for each model_type: those with the most in their config.json
    "llama", "mistral", "mixtral, windows", "qwen2, windows", "qwen3, windows", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi, norms", "phi3, longrope", "gpt_neox", "falcon 7b", "gpt2, other", "stablelm", "olmo, clipped",
    "olmo2", "granite", "smollm3, windows", "starcoder2",
)  # fmt: skip
LENGTH = 100  # tokens: beyond every window, and beyond the lengths that rotations were made for

EQUAL = "equal"
DIFFERENT = "DIFFERENT"
REFUSED_BY_US = "refused by us alone"
REFUSED_BY_TRANSFORMERS = "refused by transformers alone"
REFUSED_BY_BOTH = "refused by both"
OTHER_SHAPES = "other shapes, refused by both"
READ_IN_OTHER_SHAPES = "READ BY US IN OTHER SHAPES"
OUTCOMES = (
    EQUAL, REFUSED_BY_US, REFUSED_BY_TRANSFORMERS, REFUSED_BY_BOTH, OTHER_SHAPES, DIFFERENT, READ_IN_OTHER_SHAPES,
)  # fmt: skip

# of a tiny model; larger ones are transformers' defaults of real sizes, and are not built but on the meta device
LARGEST = dict(
    vocab_size=200, hidden_size=200, intermediate_size=300, num_hidden_layers=10, num_attention_heads=30,
    num_key_value_heads=30, head_dim=200, num_local_experts=10, moe_intermediate_size=100,
)  # fmt: skip


class OtherShapes(Exception):
    """The tensors of a checkpoint have other shapes than transformers makes of its config.json."""


class TinyModel:
    """A checkpoint of random weights that is read under many a config.json.

    It lies in two folders: with a head of its own, and without. A config that leaves out tie_word_embeddings is read
    with the files that fit what transformers makes of it.
    """

    def __init__(self, kind: str, settings: dict[str, Any], folder: Path) -> None:
        from transformers import AutoConfig
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns about what is to be tried
        logging.disable_progress_bar()
        self.tied = make(folder / "tied", kind, settings)
        self.untied = Path(shutil.copytree(self.tied, folder / "untied"))
        self.scratch = folder / "scratch"
        self.scratch.mkdir()

        # the whole of config.json, with what a file may leave out
        config = AutoConfig.from_pretrained(self.tied)
        self.hf: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))

        # the two sets of weights, and what transformers' model has in memory
        tensors = load_file(self.tied / "model.safetensors")
        self.head = "embed_out.weight" if kind == "GPTNeoX" else "lm_head.weight"
        generator = torch.Generator().manual_seed(0)
        width = config.hidden_size
        new_head = 0.2 * torch.randn(config.vocab_size, width, generator=generator)
        head = tensors.pop(self.head, new_head)
        save_file(tensors, self.tied / "model.safetensors", {"format": "pt"})
        save_file(tensors | {self.head: head}, self.untied / "model.safetensors", {"format": "pt"})
        self.state = self.state_of(config.tie_word_embeddings)
        self.shapes = shapes_of(self.state)
        self.made: dict[str, torch.Tensor] = {}  # logits, by what they were made of

    def state_of(self, tied: bool) -> dict[str, torch.Tensor]:
        from transformers import AutoModelForCausalLM

        folder = self.tied if tied else self.untied
        state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        return {name: tensor.clone() for name, tensor in state.items()}

    def theirs(self, hf: dict[str, Any], length: int = LENGTH) -> tuple[torch.Tensor, bool]:
        """transformers' logits, and whether it takes the embedding for the head."""
        from transformers import AutoConfig, AutoModelForCausalLM

        write_config(self.scratch, hf)
        config = AutoConfig.from_pretrained(self.scratch)
        tied = bool(config.tie_word_embeddings)
        made_of = f"theirs, {length}, {config.to_json_string(use_diff=False)}"
        if made_of not in self.made:
            self.made[made_of] = self.compute(AutoModelForCausalLM, config, tied, length)
        return self.made[made_of], tied

    def compute(self, auto_class: Any, config: Any, tied: bool, length: int) -> torch.Tensor:
        is_tiny = all((getattr(config, key, 0) or 0) <= largest for key, largest in LARGEST.items())
        with torch.device("cpu" if is_tiny else "meta"):
            model = auto_class.from_config(config, dtype=torch.float32).eval()
        if shapes_of(model.state_dict()) != self.shapes:
            raise OtherShapes
        assert is_tiny, "a tiny model was taken for a large one"
        head = load_file(self.untied / "model.safetensors")[self.head]
        state = self.state | {"lm_head.weight": self.state[embedding_of(self.state)] if tied else head}
        model.load_state_dict(state)
        with torch.no_grad():
            return model(tokens(1, length)).logits

    def ours(self, hf: dict[str, Any], tied: bool) -> torch.Tensor:
        """Our logits, of no more tokens than the model takes."""
        folder = self.tied if tied else self.untied
        write_config(folder, hf)
        made_of = f"ours, {folder.name}, {Config.from_checkpoint(folder)}"
        if made_of not in self.made:
            model = load_model(folder, torch.float32)
            length = min(LENGTH, model.config.block_size)
            with torch.no_grad():
                self.made[made_of] = model(tokens(1, LENGTH)[:, :length])
        return self.made[made_of]

    def compare(self, hf: dict[str, Any]) -> tuple[str, str]:
        """(one of OUTCOMES, what was said of it)."""
        # transformers
        expected = None
        tied = bool(hf.get("tie_word_embeddings", False))
        has_other_shapes = False
        try:
            expected, tied = self.theirs(hf)
            said = "transformers' logits are not finite" if not expected.isfinite().all() else ""
        except OtherShapes:
            said = "transformers makes other shapes of it"
            has_other_shapes = True
        except Exception as problem:  # whatever: it does not read this config.json
            said = f"{type(problem).__name__}: {problem}".split("\n")[0]
        is_refused = bool(said)

        # ours; any other error than InputError is a traceback that a user would see
        try:
            got = self.ours(hf, tied)
        except (InputError, RuntimeError) as refusal:
            assert isinstance(refusal, InputError) or has_other_shapes, refusal
            text = str(refusal).replace(str(self.scratch.parent), "").replace("\n", " / ")
            if has_other_shapes:
                return OTHER_SHAPES, text
            return (REFUSED_BY_BOTH if is_refused else REFUSED_BY_US), text
        if has_other_shapes:
            return READ_IN_OTHER_SHAPES, said
        if is_refused:
            return REFUSED_BY_TRANSFORMERS, said

        # a model that takes fewer tokens is asked for these
        assert expected is not None
        if got.size(1) < LENGTH:
            expected, _ = self.theirs(hf, got.size(1))
        difference = error(got, expected)
        return (EQUAL if difference < 3e-5 else DIFFERENT), f"{difference:.0e}"


def write_config(folder: Path, hf: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(hf))


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def embedding_of(state: dict[str, torch.Tensor]) -> str:
    names = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")
    return next(name for name in state if name.endswith(names))


# ---- config.json without a key


def without(hf: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in hf.items() if key not in keys}


def removals(hf: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the key, config.json without it), for every key, also those of the rotary parameters."""
    for key, value in hf.items():
        yield key, without(hf, key)
        if key == "rope_parameters" and value:
            for inner_key, inner in removals(value):
                yield f"{key}.{inner_key}", hf | {key: inner}
        elif isinstance(value, dict) and key in ("full_attention", "sliding_attention"):
            for inner_key, inner in removals(value):
                yield f"{key}.{inner_key}", hf | {key: inner}


# ---- config.json with another value of a key, or with one that this family does not have

WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = dict(rope_type="linear", factor=2.0)
OF_32 = dict(original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=4.0)
LLAMA_3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 2.0], long_factor=[1.0, 2.0, 4.0, 9.0])
BY_LAYER_TYPE = dict(full_attention=LINEAR | dict(rope_theta=500.0), sliding_attention=dict(rope_theta=50.0))

ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish", "quick_gelu", "?", None)
SWITCH = (True, False, None)
FACTOR = (2.0, None)
EPSILON = (0.05, None)
VALUES: dict[str, tuple[Any, ...]] = dict(
    hidden_act=ACTIVATIONS, hidden_activation=ACTIVATIONS, activation=ACTIVATIONS, activation_function=ACTIVATIONS,
    # heads
    head_dim=(4, 8, 16, None), num_key_value_heads=(1, 2, 4, 6, None), num_kv_heads=(1, 2, 6, None), n_head_kv=(2, 6),
    multi_query=SWITCH, query_pre_attn_scalar=(5, 5.5, None), scale_attn_weights=SWITCH,
    scale_attn_by_inverse_layer_idx=SWITCH, attn_logit_softcapping=(1.0, 0.0, None), clip_qkv=(0.3, 0.0, None),
    qk_layernorm=SWITCH, use_qk_norm=SWITCH, attention_scale=(2.0,), reorder_and_upcast_attn=(True,),
    use_bidirectional_attention=SWITCH, add_cross_attention=SWITCH,
    # blocks
    new_decoder_architecture=SWITCH, parallel_attn=SWITCH, num_ln_in_parallel_attn=(1, 2, None),
    use_parallel_residual=SWITCH, residual_multiplier=FACTOR, ffn_hidden_size=(64, 192, None), n_inner=(64, 192, None),
    intermediate_size=(64, None),
    # biases
    attention_bias=SWITCH, mlp_bias=SWITCH, qkv_bias=SWITCH, use_qkv_bias=SWITCH, use_bias=SWITCH, bias=SWITCH,
    lm_head_bias=(True,),
    # norms
    rms_norm_eps=EPSILON, layer_norm_eps=EPSILON, layer_norm_epsilon=EPSILON, norm_epsilon=EPSILON, norm_eps=EPSILON,
    # head and embedding
    tie_word_embeddings=SWITCH, final_logit_softcapping=(2.0, 0.0, None), logits_scaling=FACTOR, logit_scale=FACTOR,
    embedding_multiplier=FACTOR, attention_multiplier=FACTOR, scale_emb=FACTOR,
    # windows
    sliding_window=(10, 4096, 0, -1, None), use_sliding_window=SWITCH, max_window_layers=(0, 2, 10, None),
    layer_types=(
        ["full_attention"] * 3, ["sliding_attention"] * 3, WINDOWS, ["attention"] * 3, ["full_attention"] * 2,
        ["sliding_attention"] * 5, ["chunked_attention"] * 3, [], "full_attention", None,
    ),
    sliding_window_pattern=(1, 2, None), attention_chunk_size=(8,),
    # experts
    num_experts=(3, None), num_local_experts=(3, None), num_experts_per_tok=(1, 2, 0, 99, None), norm_topk_prob=SWITCH,
    decoder_sparse_step=(1, 2, 3, 0, None), mlp_only_layers=([], [0], [0, 1, 2], [-1], [7], None),
    moe_intermediate_size=(24, 64, None), shared_expert_intermediate_size=(8,), n_shared_experts=(1,),
    router_jitter_noise=(0.5,),
    # positions
    rope_theta=(500.0, None), rotary_emb_base=(500, None), partial_rotary_factor=(0.5, 1.0, None),
    rotary_pct=(0.5, 1.0), rope_pct=(0.5,), rotary_dim=(4,), rope_local_base_freq=(500.0,), alibi=SWITCH,
    original_max_position_embeddings=(32, 64, None), max_position_embeddings=(64, 128.0, None),
    max_sequence_length=(64, 512), n_positions=(None,), n_ctx=(16,),
    no_rope_layers=([0, 0, 0], [1, 1, 0], [1], [], None), no_rope_layer_interval=(1, 2, 5),
    rope_parameters=(
        None, {}, "linear", LINEAR, dict(type="linear", factor=2.0), dict(factor=2.0), dict(rope_theta=500.0),
        dict(rope_type="default"), BY_LAYER_TYPE, dict(full_attention=LINEAR), dict(sliding_attention=LINEAR),
        dict(full_attention=None, sliding_attention=None),
    ),
    rope_scaling=(
        None, {}, "linear", LINEAR, dict(type="linear", factor=2.0), dict(factor=2.0), LINEAR | dict(rope_theta=500.0),
        LINEAR | dict(type="dynamic"), LINEAR | dict(partial_rotary_factor=0.5), dict(rope_type="default"),
        dict(rope_type="ntk", factor=2.0), dict(rope_type=None, factor=2.0),
        dict(type="mrope", mrope_section=[1, 1, 2]),
    ),
    # other names of sizes
    hidden_size=(48,), n_embd=(48,), n_embed=(48,), n_layer=(3,), num_hidden_layers=(3,), n_head=(6,),
    num_attention_heads=(6,),
    # what is no part of the model, or of a part of it
    dtype=("bfloat16", "float16", None), torch_dtype=("bfloat16",), use_cache=(False,), attention_dropout=(0.5, None),
    initializer_range=(0.5,), pretraining_tp=(2,), is_decoder=(True,), is_encoder_decoder=(True,),
    chunk_size_feed_forward=(3,), attn_implementation=("eager",), architectures=(["Other"], None),
    auto_map=({"AutoConfig": "a.B"},), id2label=({"0": "a"},), transformers_version=("4.20.0", None),
    text_config=({}, None), per_layer_config=({"0": dict(sliding_window=5)}, {}, None),
    position_embedding_type=("alibi",),
)  # fmt: skip
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "llama3": LLAMA_3 | OF_32,
    "llama3, no length": LLAMA_3,
    "yarn": YARN | OF_32,
    "yarn, no length": YARN,
    "yarn, no factor": dict(rope_type="yarn") | OF_32,
    "yarn, null factor": dict(rope_type="yarn", factor=None) | OF_32,
    "yarn, attention_factor": YARN | OF_32 | dict(attention_factor=1.5, beta_fast=8),
    "yarn, mscale": YARN | OF_32 | dict(mscale=0.5),
    "longrope": LONG | OF_32,
    "longrope, no length": LONG,
    "longrope, factor": LONG | OF_32 | dict(factor=3.0),
    "longrope, attention_factor": LONG | OF_32 | dict(attention_factor=1.2),
    "su": LONG | OF_32 | dict(rope_type="su"),
    "default": dict(rope_type="default"),
}


def changes(hf: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is changed, config.json with it)."""
    for key, values in VALUES.items():
        for value in values:
            yield f"{key}={value}", hf | {key: value}
    yield from window_changes(hf)
    yield from rope_changes(without(hf, "rope_parameters", "rope_scaling", "rope_theta"))


def window_changes(hf: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    window = dict(use_sliding_window=True, sliding_window=10)
    yield "a window", hf | window
    yield "a window in some layers", hf | window | dict(layer_types=WINDOWS)
    yield "a window switched off in some layers", hf | window | dict(use_sliding_window=False, layer_types=WINDOWS)
    yield "no window in some layers", hf | window | dict(sliding_window=None, layer_types=WINDOWS)
    bare = without(hf, "layer_types")
    yield "no layer_types", bare
    yield "a window, no layer_types", bare | window
    yield "a window of upper layers", bare | window | dict(max_window_layers=1)
    yield "a window by a pattern", bare | window | dict(sliding_window_pattern=2)
    yield "both rotations", hf | window | dict(layer_types=WINDOWS, rope_parameters=BY_LAYER_TYPE)


def rope_changes(hf: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All kinds of scaling, in the old place and in the new one, with its base and its length here or there."""
    theta = dict(rope_theta=500.0)
    half = dict(partial_rotary_factor=0.5)
    of_48 = dict(original_max_position_embeddings=48)
    for name, form in SCALINGS.items():
        renamed = {"type" if key == "rope_type" else key: value for key, value in form.items()}
        other = dict(rope_type="linear", factor=7.0, rope_theta=300.0)
        yield f"{name}: old", hf | theta | dict(rope_scaling=form)
        yield f"{name}: old, by type", hf | theta | dict(rope_scaling=renamed)
        yield f"{name}: old, no base", hf | dict(rope_scaling=form)
        yield f"{name}: old, length at the top", hf | theta | of_48 | dict(rope_scaling=form)
        yield f"{name}: old, two lengths", hf | theta | of_48 | dict(rope_scaling=form | OF_32)
        yield f"{name}: old, half of a head", hf | theta | half | dict(rope_scaling=form)
        yield f"{name}: new", hf | dict(rope_parameters=form | theta)
        yield f"{name}: new, base at the top", hf | theta | dict(rope_parameters=form)
        yield f"{name}: new, two bases", hf | dict(rope_theta=300.0, rope_parameters=form | theta)
        yield f"{name}: new, length at the top", hf | of_48 | dict(rope_parameters=form | theta)
        yield f"{name}: new, half of a head", hf | dict(rope_parameters=form | theta | half)
        yield f"{name}: both", hf | theta | dict(rope_parameters=form | theta, rope_scaling=form)
        yield f"{name}: both, contradicting", hf | theta | dict(rope_parameters=other, rope_scaling=form)
    yield "no rotary key", hf
    yield "base alone", hf | theta
    yield "base, null scaling", hf | theta | dict(rope_scaling=None)
    yield "base and half of a head", hf | theta | half
    yield "half of a head alone", hf | half
    yield "NeoX's names", hf | dict(rotary_pct=0.5, rotary_emb_base=300)
    yield "NeoX's share alone", hf | dict(rotary_pct=0.5)
    yield "Gemma 3's names", hf | theta | dict(rope_local_base_freq=50.0)
    yield "Gemma 3's names, linear", hf | theta | dict(rope_local_base_freq=50.0, rope_scaling=LINEAR)


# ---- what we refuse though transformers reads it, and why that is right

REFUSALS = {
    "contradict each other": "two forms of one thing that say different things: one of them is a mistake",
    "expected the same of both": "the same, of one number or name",
    "the activation .* is not known": "no published model of these families has it",
    "alibi is not known": "Falcon RW; see the model's page",
    "add_cross_attention is not known": "half of a model that reads and writes",
    "use_bidirectional_attention is not known": "an encoder",
    "per_layer_config is not known": "no published model",
    "rotate alike": "rotary parameters by layer type, which transformers reads past in this family",
    "neither is": "the reverse in Gemma 3: transformers reads past what is not by layer type",
    "key 'type', expected 'rope_type'": "transformers reads past it in Gemma 3",
    "is null, expected": "a null that transformers takes for false",
    "head_dim is .*, expected hidden_size": "heads of another size than those of the weights, rotated wrongly",
    "has no 'n_head'": "a size, which transformers guesses",
    "0.0, expected more than 0": "a cap or a limit of nothing",
    "_factor has [0-9]+ numbers, expected": "transformers warns, and rotates by what comes of it",
    "layers with a window have the rotary scaling": "no published Gemma 3",
    "num_experts_per_tok is 0": "a mixture of nothing",
}
