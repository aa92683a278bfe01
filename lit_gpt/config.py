"""The shape of a model. No torch here: a config can be read, printed and compared on any machine."""

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from lit_gpt import families
from lit_gpt.errors import InputError, reading

SAMPLE = Path("checkpoints/sample/SmolLM2-135M-Instruct-Q4_1")  # what scripts/download_sample.py writes

MAY_BE_ZERO = ("n_layer", "norm_eps", "rotary_percentage")  # besides what usually is


@dataclass(frozen=True)
class Config:
    """Everything `model.py` needs to build a GPT: the sizes, and which classes to build it from.

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
    """plain, scaled (by embedding_scale) or positions (learned ones are added). `model.py` has tables of the classes
    that this and the next names stand for."""
    block: str = "sequential"
    norm: str = "RMSNorm"
    norm_eps: float = 1e-5
    mlp: str = "LLaMAMLP"
    activation: str = "silu"
    attn_bias: bool = False
    """Of q, k and v."""
    proj_bias: bool = False
    """Of the attention's output projection."""
    mlp_bias: bool = False
    lm_head_bias: bool = False
    rotary_percentage: float = 1.0
    """The share of each head that is rotated."""
    rope_base: float = 10000
    rope_scaling: dict[str, Any] | None = None
    """How positions are stretched, in Hugging Face's words: {"rope_type": "llama3", "factor": 8.0, ...}."""
    rope_local_base: float | None = None
    """Layers with a sliding window use this base, unscaled, where it is given."""
    no_rope_layers: list[int] = field(default_factory=list)
    """Layers that know no positions."""
    tie_embeddings: bool = False
    """Whether the head is the embedding, one tensor."""
    sliding_window: int | None = None
    """A token attends to the last so many, itself included."""
    sliding_layers: list[int] | None = None
    """Layers with a sliding window. None is all, where there is a window."""
    qk_norm: str | None = None
    """What is done to queries and keys: per_head, each_head, all_heads, clip."""
    clip_qkv: float | None = None
    attn_scale: float | None = None
    """Of the attention scores. None is 1 / sqrt(head_size)."""
    attn_softcap: float | None = None
    final_softcap: float | None = None
    """Of the logits."""
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
        for spec in fields(self):  # a config.json is somebody else's file
            value = getattr(self, spec.name)
            kinds = get_args(spec.type) if isinstance(spec.type, UnionType) else (spec.type,)
            kinds = tuple(get_origin(kind) or kind for kind in kinds)
            whole = isinstance(value, int) and not isinstance(value, bool) and float in kinds
            if not (isinstance(value, kinds) or whole) or (isinstance(value, bool) and bool not in kinds):
                names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
                raise InputError(f"{spec.name} is {value!r}, expected {names}.")
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(spec.name, value, may_be_zero=spec.default == 0 or spec.name in MAY_BE_ZERO)
        derived = {
            "n_query_groups": self.n_query_groups or self.n_head,
            "head_size": self.head_size or self.n_embd // self.n_head,
            "intermediate_size": self.intermediate_size or 4 * self.n_embd,
        }
        for key, value in derived.items():
            object.__setattr__(self, key, value)  # the instance is frozen for everybody else
        if self.n_head % self.n_query_groups:
            raise InputError(f"{self.n_head} query heads cannot share {self.n_query_groups} groups of keys and values.")
        if self.n_expert_per_token > self.n_expert:
            raise InputError(f"{self.n_expert_per_token} experts per token of {self.n_expert} are too many.")
        if self.rotary_percentage > 1 or self.rope_n_elem % 2:
            share = f"{self.rotary_percentage} of {self.head_size} elements"
            raise InputError(f"{share} of a head are to be rotated, expected an even number of them, and not more.")
        self.check_scaling(self.rope_scaling or {})

    def check_scaling(self, scaling: dict[str, Any]) -> None:
        """Raises InputError for what no kind of scaling can work with."""
        needed = families.ROPE_TYPES[scaling.get("rope_type", "default")]
        for key, value in scaling.items():
            numbers, n = (value, self.rope_n_elem // 2) if key in ("short_factor", "long_factor") else ([value], 1)
            if len(numbers) != n:
                raise InputError(f"{key} has {len(numbers)} numbers, expected {n}.")
            for number in numbers:
                if key != "rope_type" and number is not None:
                    check_number(key, number, may_be_zero=key not in (*needed, "factor"))

    @property
    def padded_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def rope_n_elem(self) -> int:
        """How many elements of a head are rotated."""
        return int(self.rotary_percentage * self.head_size)

    def window_of(self, layer: int) -> int | None:
        """How many tokens a layer sees; None is all."""
        return self.sliding_window if self.sliding_layers is None or layer in self.sliding_layers else None

    def rope_of(self, layer: int) -> str:
        """Which rotation a layer uses: global, local or none."""
        if layer in self.no_rope_layers:
            return "none"
        return "local" if self.rope_local_base is not None and self.window_of(layer) else "global"

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "Config":
        """A published model's config, by its repository `org/name` or by `name` alone.

        Raises:
            InputError: no such name; the nearest ones are listed.
        """
        family, sizes = families.by_name(name)
        return cls(**{"name": name.split("/")[-1], "family": family} | sizes | overrides)

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path, **overrides: Any) -> "Config":
        """Reads `lit_config.json`, or what Hugging Face's `config.json` says.

        Raises:
            InputError: neither is there, or it describes an architecture that no family knows, or sizes of no model.
        """
        checkpoint_dir = Path(checkpoint_dir)
        ours, theirs = checkpoint_dir / "lit_config.json", checkpoint_dir / "config.json"
        path = ours if ours.is_file() else theirs
        if not path.is_file():
            raise InputError(
                f"{checkpoint_dir} is no checkpoint: it has no config.json."
                " `python scripts/download_sample.py` fetches a small one."
            )
        content = read_json(path)
        with reading(path):
            if path == ours:
                settings = {field.name: content[field.name] for field in fields(cls) if field.name in content}
            else:
                family, settings = families.from_hf(content, path)
                settings |= {"name": checkpoint_dir.name, "family": family}
            return cls(**settings | overrides)

    def save(self, checkpoint_dir: Path) -> None:
        text = json.dumps(asdict(self), indent=2)
        (checkpoint_dir / "lit_config.json").write_text(text + "\n", encoding="utf-8")

    def replace(self, **changes: Any) -> "Config":
        return replace(self, **changes)


def check_number(name: str, value: Any, may_be_zero: bool) -> None:
    if not isinstance(value, int | float) or not 0 <= value < math.inf or (value == 0 and not may_be_zero):
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
