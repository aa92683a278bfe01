"""LoRA in the format of the peft library: adapter_config.json and adapter_model.safetensors.

If the checkpoint fuses linears that we keep apart, its one change stands for several of ours:

    export    q: B1 A1   k: B2 A2      ->     q k: | B1  0 | | A1 |      rank r1 + r2, and as much more alpha
                                                   |  0 B2 | | A2 |
    import    q k: B A                 ->     q: Bq A   k: Bk A          A for both, each its own rows of B
"""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import torch

from lit_gpt import families
from lit_gpt.checkpoint.load import parameter_shapes
from lit_gpt.checkpoint.quantized_elsewhere import PLAIN
from lit_gpt.checkpoint.save import save_tensors
from lit_gpt.checkpoint.tensor_names import fused_rows, hf_name, lit_names, name_map_of, to_lit
from lit_gpt.checkpoint.weight_files import read_metadata, read_tensors
from lit_gpt.config import Config, read_json
from lit_gpt.errors import InputError, reading
from lit_gpt.lora import LoRA
from lit_gpt.name_patterns import value_by_end
from lit_gpt.quantize import Quantize

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all names in WEIGHTS
QUANTIZE = "lit_gpt.quantize"  # in the header of WEIGHTS: peft itself has no place for how its base was quantized
SCALE = "lit_gpt.scale"  # in the header of files: how much of what was trained is in them, if it is not all
OUR_LEAVES = {  # the end of a name in WEIGHTS -> the end of ours
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
    "lora_magnitude_vector.weight": "lora_magnitude",  # its name inside of peft
}
PEFT_LEAVES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
UNKNOWN_SETTINGS = (  # of peft, with which an adapter is more than a change B A of linears
    "modules_to_save", "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "lora_bias", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
KNOWN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights: they leave the base alone

Change = dict[str, torch.Tensor]  # lora_A (r, in), lora_B (out, r) and, for DoRA, lora_magnitude (out,)
Tensors = dict[str, torch.Tensor]  # by our names: transformer.h.3.attn.q.lora_A


def save_peft(
    trained: Tensors,
    lora: LoRA,
    config: Config,
    base: str,
    folder: Path,
    quantize: Quantize | None = None,
    scale: float = 1.0,
) -> None:
    """Writes trained LoRA weights such that `PeftModel.from_pretrained(base, folder)` loads them.

    `quantize` is how the base was quantized in training, for `read_quantize`. `scale` is what the weights have been
    scaled by, for whoever reads the header.

    Raises:
        InputError: DoRA on a part of a fused linear: its one magnitude would need the other parts' too. Or LoRA on the
            experts of a mixture, which transformers 5 keeps in one tensor, or DoRA, a rank or an alpha of its own for
            what chooses them. Or LoRA on the head of gpt_neox.
    """
    changes = by_module(trained)
    groups = fused_groups(changes, config)
    check_exportable(changes, groups, config)

    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for hf_module, parts in groups.items():
        # one change for all parts of a fused linear
        change = changes[parts[0]] if len(parts) == 1 else fuse_changes(changes, parts, lora, config)
        for leaf, tensor in change.items():
            tensors[f"{PREFIX}{hf_module}.{PEFT_LEAVES[leaf]}"] = tensor

        # scaling = alpha / rank, or alpha / sqrt(rank): the alpha that keeps the scaling of the first part
        rank = change["lora_A"].size(0)
        first_trained = next(part for part in parts if part in changes)
        ranks[hf_module] = rank
        alphas[hf_module] = lora.scaling_of(first_trained) * (rank**0.5 if lora.rslora else rank)

        # peft 0.21 changes the router as a parameter, for which it has no DoRA and does not look at patterns
        is_plain = rank == lora.r and math.isclose(alphas[hf_module], lora.alpha) and not lora.dora
        if hf_module.endswith(".gate") and not is_plain:
            raise InputError(
                f"peft changes {hf_module} with the rank and the alpha of all, and without DoRA. Merge instead:"
                " scripts/merge_lora.py."
            )

    save_tensors(tensors, folder / WEIGHTS, {QUANTIZE: quantize or "none"} | scale_metadata(scale))
    settings = peft_settings(lora, config, base, ranks, alphas)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def scale_metadata(scale: float) -> dict[str, str]:
    """What the header of a file says of its scale: nothing if it is 1."""
    return {} if scale == 1 else {SCALE: f"{scale:g}"}


def by_module(trained: Tensors) -> dict[str, Change]:
    """The trained tensors by the linear that they change, in float32, which is what peft trains in."""
    changes: dict[str, Change] = defaultdict(dict)
    for name, tensor in trained.items():
        module, _, leaf = name.rpartition(".")
        changes[module][leaf] = tensor.float()
    return dict(changes)


def fused_groups(changes: dict[str, Change], config: Config) -> dict[str, list[str]]:
    """The checkpoint's linears that are changed -> all of our linears in each, changed or not."""
    groups = {}
    for module in changes:
        name, part_names = hf_name(f"{module}.weight", config)
        groups[name.removesuffix(".weight")] = [part.removesuffix(".weight") for part in part_names]
    return groups


def check_exportable(changes: dict[str, Change], groups: dict[str, list[str]], config: Config) -> None:
    """Raises InputError for linears that peft cannot change, or not under one name."""
    in_mlp = [module for module in changes if ".mlp." in module and not module.endswith(".gate")]
    if config.n_expert and in_mlp:
        # by the end of its name, peft also takes an MLP between the mixtures for their experts
        raise InputError(
            "peft cannot change the experts of a mixture one by one. Merge instead: scripts/merge_lora.py."
        )
    if "embed_out" in groups:
        raise InputError(
            "The head of gpt_neox is embed_out or lm_head to peft, by the version of transformers. Merge instead:"
            " scripts/merge_lora.py."
        )


def fuse_changes(changes: dict[str, Change], parts: list[str], lora: LoRA, config: Config) -> Change:
    """One change of a fused linear from those of its parts, of which some may not be adapted. See the drawing above.

    Raises:
        InputError: DoRA, and not all parts are adapted.
    """
    adapted = [part for part in parts if part in changes]
    if lora.dora and adapted != parts:
        raise InputError(
            f"peft's DoRA has one magnitude for all of {', '.join(parts)}, and not all are trained. Merge instead."
        )
    n_rows = fused_size(parts, config)
    rows_of_parts = fused_rows([f"{part}.weight" for part in parts], config, n_rows)
    rows = dict(zip(parts, rows_of_parts, strict=True))

    # A: below each other. B: each part's rows, in the columns that its A has; scaled, since one alpha is for all
    A = torch.cat([changes[part]["lora_A"] for part in adapted])
    B = A.new_zeros(n_rows, A.size(0))
    column = 0
    for part in adapted:
        part_B = changes[part]["lora_B"] * (lora.scaling_of(part) / lora.scaling_of(adapted[0]))
        rank = part_B.size(1)
        B[rows[part], column : column + rank] = part_B
        column += rank
    fused = {"lora_A": A, "lora_B": B}

    if lora.dora:
        magnitude = A.new_zeros(n_rows)
        for part in parts:
            magnitude[rows[part]] = changes[part]["lora_magnitude"]
        fused["lora_magnitude"] = magnitude
    return fused


def fused_size(parts: list[str], config: Config) -> int:
    """How many rows a fused linear has: three parts are q, k and v, two are the inputs of an MLP with a gate."""
    if len(parts) == 3:
        return (config.n_head + 2 * config.n_query_groups) * config.head_size
    return 2 * config.intermediate_size


def peft_settings(
    lora: LoRA, config: Config, base: str, ranks: dict[str, int], alphas: dict[str, float]
) -> dict[str, Any]:
    """The content of adapter_config.json. `ranks` and `alphas` are by the checkpoint's names of the linears."""
    # short names if they say it: target_modules ["q_proj"] is the q_proj of every layer
    last_parts = {name.rsplit(".", 1)[-1] for name in ranks}
    in_every_layer = all(name in ranks for name in all_modules(config) if name.rsplit(".", 1)[-1] in last_parts)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(last_parts if in_every_layer else ranks),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != lora.r},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != lora.alpha},
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "fan_in_fan_out": bool(families.definition(config.family, "TRANSPOSED")),
        "bias": "none",
    }


def all_modules(config: Config) -> list[str]:
    """The checkpoint's names of all modules with weights, of all blocks and outside of them."""
    modules = []
    for template in name_map_of(config):
        n_layer = config.n_layer if "{}" in template else 1
        modules += [template.replace("{}", str(layer), 1) for layer in range(n_layer)]
    return modules


def read_quantize(folder: Path) -> Quantize | None:
    """How the base of an adapter was quantized in training; None if it was not, or if that is unknown."""
    quantize = stored_quantize(folder)
    for known in get_args(Quantize):
        if quantize == known:
            return known
    return None


def says_quantize(folder: Path) -> bool:
    """Whether an adapter says how its base was quantized in training: one that `save_peft` has written."""
    return stored_quantize(folder) is not None


def stored_quantize(folder: Path) -> str | None:
    """What `save_peft` has written in an adapter of the quantization of its base; None if peft wrote it."""
    file = folder / WEIGHTS
    return read_metadata(file).get(QUANTIZE) if file.is_file() else None


def load_peft(folder: Path, config: Config) -> tuple[LoRA, Tensors]:
    """Settings and weights, by our names, of an adapter that peft saved.

    Raises:
        InputError: it is no LoRA, trains something else besides, or does not fit the model.
    """
    # a change to the head is one, whether the head is the embedding or not
    config = config.replace(tie_embeddings=False)
    settings = read_json(folder / CONFIG)
    check_settings(settings, folder)

    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    shapes = parameter_shapes(config)
    changes = read_changes(folder / WEIGHTS)
    check_complete(folder, settings, changes, config)
    for hf_module, change in changes.items():
        with reading(folder / CONFIG):
            alpha = value_by_end(hf_module, settings.get("alpha_pattern") or {}, default=settings["lora_alpha"])
            rank = value_by_end(hf_module, settings.get("rank_pattern") or {}, default=settings["r"])
        check_rank(folder, hf_module, change, rank)
        try:
            weights = [shapes[name] for name in lit_names(f"{hf_module}.weight", config)]
            check_change(folder / WEIGHTS, hf_module, change, weights)
            parts = split_change(hf_module, change, config)
        except KeyError:
            raise InputError(f"{folder / WEIGHTS} changes {hf_module}, which is in no {config.family} model.") from None
        for module, part in parts.items():
            tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in part.items()}
            ranks[module] = part["lora_A"].size(0)
            alphas[module] = alpha
    with reading(folder / CONFIG):
        return our_settings(settings, ranks, alphas), tensors


def check_settings(settings: dict[str, Any], folder: Path) -> None:
    """Raises InputError if an adapter is no LoRA, or more than that."""
    peft_type = settings.get("peft_type")
    if peft_type != "LORA":
        raise InputError(f"{folder} holds a {peft_type} of peft, and only LORA can be used here.")

    unknown = [key for key in UNKNOWN_SETTINGS if settings.get(key)]
    bias = settings.get("bias", "none")
    if bias != "none":
        unknown.append(f"bias {bias!r}")
    # other ways to begin (pissa, olora) change the base, too: it would not be the one that is loaded
    start = settings.get("init_lora_weights")
    if start not in KNOWN_STARTS:
        unknown.append(f"init_lora_weights {start!r}")
    if unknown:
        raise InputError(f"{folder} was trained with {unknown[0]}, which is not known here. Merge it with peft.")


def read_changes(file: Path) -> dict[str, Change]:
    """The changes in an adapter_model.safetensors, by the checkpoint's names of the linears.

    Raises:
        InputError: the file is missing, or holds something else, or an A without its B.
    """
    if not file.is_file():
        raise InputError(f"{file.parent} has no {WEIGHTS}. Let peft save it again, with safe_serialization.")
    leaves = "|".join(re.escape(leaf) for leaf in OUR_LEAVES)
    changes: dict[str, Change] = defaultdict(dict)
    for name, tensor in read_tensors([file]):
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            continue  # peft saves a head that it adapts, as it was before
        match = re.fullmatch(rf"{PREFIX}(.+)\.({leaves})", name)
        if match is None:
            raise InputError(f"{file} holds {name}, which is no part of a LoRA of linears. Merge it with peft.")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in PLAIN:
            raise InputError(f"{file} holds {name} in {dtype}, expected float32, bfloat16 or float16.")
        hf_module, leaf = match.groups()
        changes[hf_module][OUR_LEAVES[leaf]] = tensor.float()

    if not changes:
        raise InputError(f"{file} holds no change at all. Copy or download it again.")
    for hf_module, change in changes.items():
        for leaf in ("lora_A", "lora_B"):
            if leaf not in change:
                raise InputError(f"{file} lacks {hf_module}.{leaf}. Copy or download it again.")
    return dict(changes)


def check_complete(folder: Path, settings: dict[str, Any], changes: dict[str, Change], config: Config) -> None:
    """Raises InputError if linears that the settings name have no change in the file.

    Only names that mean every layer are looked up: peft's patterns and choices of layers are its own matter. So are the
    experts of a mixture, which are no linears in transformers 5.
    """
    targets = settings.get("target_modules")
    chooses_layers = any(settings.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if not isinstance(targets, list) or chooses_layers:
        return
    shapes = parameter_shapes(config)
    for hf_module in all_modules(config):
        is_named = any(f".{hf_module}".endswith(f".{target}") for target in targets)
        if not is_named or ".experts." in hf_module or hf_module in changes:
            continue
        if all(name in shapes for name in lit_names(f"{hf_module}.weight", config)):
            raise InputError(
                f"{folder / WEIGHTS} has no change of {hf_module}, which {CONFIG} names. Copy or download both again,"
                " and name their base: --checkpoint_dir."
            )


def check_rank(folder: Path, hf_module: str, change: Change, rank: Any) -> None:
    """Raises InputError if a change has another rank than its settings say, by which it would be scaled."""
    found = change["lora_A"].size(0)
    if rank != found:
        raise InputError(
            f"{folder / CONFIG} holds a value that cannot be used: the rank of {hf_module} is {rank!r}, and in"
            f" {WEIGHTS} it is {found}. Copy or download both again."
        )


def check_change(file: Path, hf_module: str, change: Change, weights: list[list[int]]) -> None:
    """Raises InputError for a change of other sizes than the linear, whose parts have weights of these shapes."""
    n_rows = sum(shape[0] for shape in weights)
    rank = change["lora_A"].size(0)
    expected = {"lora_A": [rank, weights[0][1]], "lora_B": [n_rows, rank], "lora_magnitude": [n_rows]}
    for leaf, tensor in change.items():
        shape = list(tensor.shape)
        if shape != expected[leaf]:
            raise InputError(
                f"{file} does not fit this model: {hf_module}.{leaf} has shape {shape}, expected {expected[leaf]}. Name"
                " its base: --checkpoint_dir."
            )


def split_change(hf_module: str, change: Change, config: Config) -> dict[str, Change]:
    """The change of one of the checkpoint's linears as changes of ours, by our names.

    A is for all parts of a fused linear; B (out, r) and the magnitude (out,) are split by rows.

    Raises:
        KeyError: the family does not know the linear.
    """
    B = split_rows(hf_module, change["lora_B"], config)
    parts = {module: {"lora_A": change["lora_A"], "lora_B": part_B} for module, part_B in B.items()}
    if "lora_magnitude" in change:
        for module, magnitude in split_rows(hf_module, change["lora_magnitude"], config).items():
            parts[module]["lora_magnitude"] = magnitude
    return parts


def split_rows(hf_module: str, tensor: torch.Tensor, config: Config) -> Tensors:
    """Splits a tensor that has the rows of a linear's weight, and returns each part by our name of its linear.

    `to_lit` does it, which knows how the rows of every family are fused. The tensor goes there as the linear's bias: a
    weight may be kept as (in, out) and would be transposed, a bias never is.

        c_attn.bias, B (3 C, r)      ->     attn.q.bias, (C, r)    attn.k.bias, (C, r)    attn.v.bias, (C, r)
    """
    named = to_lit(f"{hf_module}.bias", tensor, config)
    return {name.removesuffix(".bias"): part for name, part in named}


def our_settings(settings: dict[str, Any], ranks: dict[str, int], alphas: dict[str, float]) -> LoRA:
    """The LoRA that changes exactly the linears in `ranks`, from what adapter_config.json says."""
    r = settings["r"]
    alpha = settings["lora_alpha"]
    if not (isinstance(r, int) and isinstance(alpha, int | float)):
        raise TypeError(f"r is {r!r}, lora_alpha {alpha!r}, expected numbers")
    return LoRA(
        r=r,
        alpha=alpha,
        dropout=settings.get("lora_dropout") or 0.0,
        modules=[re.escape(name) for name in ranks],
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={re.escape(name): value for name, value in alphas.items() if value != alpha},
        rslora=settings.get("use_rslora", False),
        dora=settings.get("use_dora", False),
    )
