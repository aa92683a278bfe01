"""The shape of a model. No torch here: a config can be read, printed and compared on any machine."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from lit_gpt import families
from lit_gpt.errors import InputError, reading
from lit_gpt.files import list_some, not_there

CHECKPOINTS = Path("checkpoints")  # where scripts/download.py puts ORG/NAME
SAMPLE = CHECKPOINTS / "sample/SmolLM2-135M-Instruct-Q4_1"  # what scripts/download_sample.py writes

PARTS = ("config.json", "lit_config.json", "tokenizer.json", "tokenizer.model")  # a folder with one is a checkpoint

MAY_BE_ZERO = ("n_layer", "norm_eps", "rotary_percentage")  # besides numbers that are 0 by default


@dataclass(frozen=True)
class Config:
    """All that `lit_gpt/model/` needs to build a GPT: the sizes, and the names of the classes to build it from.

    n_head = 4, n_query_groups = 4        n_query_groups = 2              n_query_groups = 1
    multi-head attention                  grouped-query attention         multi-query attention
    v v v v                               v   v                           v
    k k k k                               k   k                           k
    | | | |                               |\\  |\\                          |\\\\__
    q q q q                               q q q q                         q q q q
    """

    name: str = ""
    family: str = "llama"
    """The file in `lit_gpt/families/` that knows the names of the checkpoint's tensors."""
    block_size: int = 2048
    """The longest record, in tokens."""
    vocab_size: int = 32000
    """Rows of the embedding. Some checkpoints pad it beyond what the tokenizer uses."""
    n_layer: int = 16
    n_head: int = 32
    n_embd: int = 4096
    n_query_groups: int | None = None
    """Heads of keys and values. None is one for each query head."""
    head_size: int | None = None
    """None is n_embd / n_head."""
    intermediate_size: int | None = None
    """Width of the MLP. None is 4 n_embd."""
    embedding: str = "plain"
    """plain, scaled (by embedding_scale) or positions (learned ones are added): EMBEDDINGS in model/embeddings.py."""
    block: str = "sequential"
    """The order of norms, attention and MLP: BLOCKS in model/gpt.py."""
    norm: str = "RMSNorm"
    """NORMS in model/norms.py."""
    norm_eps: float = 1e-5
    mlp: str = "LLaMAMLP"
    """MLPS in model/mlp.py."""
    activation: str = "silu"
    """ACTIVATIONS in model/fused.py."""
    attn_bias: bool = False
    """Whether q, k and v have a bias."""
    proj_bias: bool = False
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool = False
    lm_head_bias: bool = False
    rotary_percentage: float = 1.0
    """The share of each head that is rotated."""
    rope_base: float = 10000
    rope_scaling: dict[str, Any] | None = None
    """How positions are stretched, in Hugging Face's words: {"rope_type": "llama3", "factor": 8.0, ...}."""
    rope_local_base: float | None = None
    """Layers with a sliding window use this base, unscaled. None: they use the others' base and scaling."""
    no_rope_layers: list[int] = field(default_factory=list)
    """Layers that know no positions."""
    tie_embeddings: bool = False
    """Whether the head is the embedding, one tensor."""
    sliding_window: int | None = None
    """A token attends to the last so many, itself included."""
    sliding_layers: list[int] | None = None
    """Layers with a sliding window. None is all, if there is a window."""
    qk_norm: str | None = None
    """How queries and keys are normalized: per_head, each_head, all_heads, clip. None: they are not."""
    clip_qkv: float | None = None
    """Largest entry of q, k and v, if qk_norm is clip."""
    attn_scale: float | None = None
    """Factor on the attention scores. None is 1 / sqrt(head_size)."""
    attn_scale_by_layer: bool = False
    """Whether the scores of layer i, counted from 0, are also divided by i + 1."""
    attn_softcap: float | None = None
    """Soft cap of the attention scores."""
    final_softcap: float | None = None
    """Soft cap of the logits."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    n_expert: int = 0
    """Experts of a mixture."""
    n_expert_per_token: int = 0
    renormalize_experts: bool = True
    """Whether the weights of the chosen experts add up to one."""
    moe_intermediate_size: int | None = None
    """Width of an expert. None is intermediate_size."""
    dense_layers: list[int] = field(default_factory=list)
    """Layers without experts, in a model that has them."""

    def __post_init__(self) -> None:
        # every field is of its type, and a number in its range: a config.json is somebody else's file
        for spec in fields(self):
            value = getattr(self, spec.name)
            check_type(spec.name, value, spec.type)
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(spec.name, value, may_be_zero=spec.default == 0 or spec.name in MAY_BE_ZERO)

        # sizes that follow from others; the instance is frozen for everybody else
        derived = {
            "n_query_groups": self.n_query_groups or self.n_head,
            "head_size": self.head_size or self.n_embd // self.n_head,
            "intermediate_size": self.intermediate_size or 4 * self.n_embd,
        }
        for key, value in derived.items():
            object.__setattr__(self, key, value)

        # sizes that fit together
        if self.n_head % self.n_query_groups:
            raise InputError(f"{self.n_head} query heads cannot share {self.n_query_groups} groups of keys and values.")
        if self.n_expert_per_token > self.n_expert:
            raise InputError(f"{self.n_expert_per_token} experts per token of {self.n_expert} are too many.")
        if self.rotary_percentage > 1 or self.rope_n_elem % 2:
            share = f"{self.rotary_percentage} of {self.head_size} elements"
            raise InputError(f"{share} of a head are to be rotated, expected an even number of them, and not more.")
        scaling = self.rope_scaling or {}
        self.check_scaling(scaling)
        if scaling.get("rope_type") == "dynamic" and self.rope_n_elem == 2:
            raise InputError("2 elements of a head are to be rotated, dynamically scaled ones are 4 or more.")

    def check_scaling(self, scaling: dict[str, Any]) -> None:
        """Raises InputError if a number of `rope_scaling` is none, or if there are too few or too many of them."""
        positive = (*families.ROPE_TYPES[scaling.get("rope_type", "default")], "factor")
        for key, value in scaling.items():
            if key == "rope_type":
                continue
            # one number, or one for each pair of rotated elements
            numbers = [value]
            expected = 1
            if key in ("short_factor", "long_factor"):
                numbers = value
                expected = self.rope_n_elem // 2
            if len(numbers) != expected:
                raise InputError(f"{key} has {len(numbers)} numbers, expected {expected}.")
            for number in numbers:
                if number is not None:
                    check_number(key, number, may_be_zero=key not in positive)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size, in which the padding of a checkpoint is counted."""
        return self.vocab_size

    @property
    def rope_n_elem(self) -> int:
        """How many elements of a head are rotated."""
        return int(self.rotary_percentage * self.head_size)

    def window_of(self, layer: int) -> int | None:
        """How many tokens a layer attends to; None is all."""
        if self.sliding_layers is None or layer in self.sliding_layers:
            return self.sliding_window
        return None

    def attn_scale_of(self, layer: int) -> float | None:
        """The factor on the attention scores of a layer; None is 1 / sqrt(head_size)."""
        if not self.attn_scale_by_layer:
            return self.attn_scale
        assert self.head_size is not None, "it follows from other sizes, see __post_init__"
        scale = self.head_size**-0.5 if self.attn_scale is None else self.attn_scale
        return scale / (layer + 1)

    def rope_of(self, layer: int) -> str:
        """Which rotation a layer uses: global, local or none."""
        if layer in self.no_rope_layers:
            return "none"
        if self.rope_local_base is not None and self.window_of(layer):
            return "local"
        return "global"

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "Config":
        """A published model's config, by its repository `org/name` or by `name` alone.

        Raises:
            InputError: no such name; the nearest ones are listed.
        """
        family, settings = families.by_name(name)
        return cls(**{"name": name.split("/")[-1], "family": family} | settings | overrides)

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path, **overrides: Any) -> "Config":
        """Reads our `lit_config.json`, or else Hugging Face's `config.json`.

        Raises:
            InputError: see `check_is_checkpoint`; or neither is there, or it describes an architecture that no family
                knows, or sizes of no model.
        """
        checkpoint_dir = Path(checkpoint_dir)
        check_is_checkpoint(checkpoint_dir)
        path = checkpoint_dir / "lit_config.json"
        is_ours = path.is_file()
        if not is_ours:
            path = checkpoint_dir / "config.json"
        if not path.is_file():
            if (checkpoint_dir / "adapter_config.json").is_file():
                raise InputError(
                    f"{checkpoint_dir} holds an adapter of peft, expected a checkpoint. It is named with --finetuned."
                )
            raise InputError(
                f"{checkpoint_dir} is no checkpoint: it has no config.json."
                " `python scripts/download_sample.py` fetches a small one."
            )
        content = read_json(path)
        with reading(path):
            if is_ours:
                settings = {spec.name: content[spec.name] for spec in fields(cls) if spec.name in content}
            else:
                family, settings = families.from_hf(content, path)
                settings |= {"name": checkpoint_dir.name, "family": family}
            return cls(**settings | overrides)

    def save(self, checkpoint_dir: Path) -> None:
        text = json.dumps(asdict(self), indent=2)
        (checkpoint_dir / "lit_config.json").write_text(text + "\n", encoding="utf-8")

    def replace(self, **changes: Any) -> "Config":
        return replace(self, **changes)


def check_is_checkpoint(checkpoint_dir: Path) -> None:
    """Tells a wrong name from a damaged checkpoint: whoever reads one calls this first.

    Raises:
        InputError: there is no such folder, or it is something that can be taken for one.
    """
    if not checkpoint_dir.exists():
        raise not_there(checkpoint_dir, checkpoints_near(checkpoint_dir), how_to_fetch(checkpoint_dir))
    if not checkpoint_dir.is_dir():
        advice = "Name its folder."
        if checkpoint_dir.suffix == ".gguf":
            advice = (
                f"`python scripts/convert_gguf_checkpoint.py --gguf_path {checkpoint_dir}` makes one, in --out_dir."
            )
        raise InputError(f"{checkpoint_dir} is a file, expected the folder of a checkpoint. {advice}")
    if any((checkpoint_dir / name).is_file() for name in PARTS):
        return
    if (checkpoint_dir / "hyperparameters.yaml").is_file():
        raise InputError(f"{checkpoint_dir} holds a run, expected a checkpoint. A run is named with --finetuned.")
    inside = checkpoints_in(checkpoint_dir)
    if inside:
        raise InputError(f"{checkpoint_dir} is no checkpoint, but holds some. Name one: {list_some(inside)}.")


def checkpoints_near(checkpoint_dir: Path) -> list[Path]:
    """The checkpoint folders of which one may be meant by the name of a folder that is not there."""
    on_our_shelf = CHECKPOINTS / checkpoint_dir
    if on_our_shelf.is_dir():
        return [on_our_shelf]
    return [*checkpoints_in(CHECKPOINTS), *checkpoints_in(checkpoint_dir.parent)]


def checkpoints_in(folder: Path) -> set[Path]:
    """The checkpoint folders in a folder: NAME, or ORG/NAME as the hub has them."""
    configs = [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
    return {path.parent for path in configs}


def how_to_fetch(checkpoint_dir: Path) -> str:
    """The command that fetches a checkpoint of this name, as a sentence; empty if it lies among the checkpoints."""
    if (CHECKPOINTS / checkpoint_dir).is_dir():
        return ""
    if checkpoint_dir == SAMPLE:
        return "`python scripts/download_sample.py` fetches it."
    name = checkpoint_dir.relative_to(CHECKPOINTS) if checkpoint_dir.is_relative_to(CHECKPOINTS) else checkpoint_dir
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name.as_posix()):
        return f"If it is on the hub, `python scripts/download.py --repo_id {name.as_posix()}` fetches it."
    return "`python scripts/download_sample.py` fetches a small one."


def check_type(name: str, value: Any, annotation: Any) -> None:
    """Raises InputError if a value is not of the annotated type, such as `int | None`. Entries are not looked at."""
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    types = tuple(get_origin(option) or option for option in options)  # list[int] -> list
    if isinstance(value, bool):
        fits = bool in types  # for Python it is an int, too
    elif isinstance(value, int):
        fits = int in types or float in types
    else:
        fits = isinstance(value, types)
    if not fits:
        names = " or ".join(kind.__name__ for kind in types if kind is not type(None))
        raise InputError(f"{name} is {value!r}, expected {names}.")


def check_number(name: str, value: Any, may_be_zero: bool) -> None:
    """Raises InputError if a value is no number, negative or infinite, or 0 where that makes no sense."""
    is_number = isinstance(value, int | float)
    if not is_number or not 0 <= value < math.inf or (value == 0 and not may_be_zero):
        raise InputError(f"{name} is {value!r}, expected {'0 or more' if may_be_zero else 'more than 0'}, and finite.")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        InputError: it is missing, not JSON, or no mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except ValueError as error:  # also what is not UTF-8
        raise InputError(f"{path} is not readable as JSON ({error}). Copy or download it again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} where a JSON object is expected.")
    return content
