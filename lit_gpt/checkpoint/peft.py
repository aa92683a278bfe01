"""LoRA in the format of the peft library: adapter_config.json and adapter_model.safetensors.

Where the original fuses linears that we keep apart, its one change stands for several of ours:

    ours     q: B1 A1   k: B2 A2            fused    | B1  0 | | A1 |      rank r1 + r2, and as much more alpha
    fused    q k: B A                                |  0 B2 | | A2 |      ours: A for both, each its rows of B"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from lit_gpt import families
from lit_gpt.checkpoint.load import read_tensors
from lit_gpt.checkpoint.save import save_tensors
from lit_gpt.checkpoint.tensor_names import fused_rows, hf_name, name_map_of, to_lit
from lit_gpt.config import Config, read_json
from lit_gpt.errors import InputError, reading
from lit_gpt.lora import LoRA

START = "base_model.model."  # of peft's names
LEAVES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
OTHERS = (  # settings of peft with which an adapter is more than the change above
    "modules_to_save", "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "lora_bias", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def save_peft(trained: Tensors, lora: LoRA, config: Config, base: str, folder: Path) -> None:
    """Writes trained LoRA weights, by our names, such that `PeftModel.from_pretrained(base, folder)` loads them.

    Raises:
        InputError: DoRA on a part of what the original fuses: its one magnitude would need the other parts' too. Or
            LoRA on the experts of a mixture, which transformers 5 keeps in one tensor. Or on the head of gpt_neox.
    """
    if any(".experts." in name for name in trained):
        raise InputError(
            "peft cannot change the experts of a mixture one by one. Merge instead: scripts/merge_lora.py."
        )
    ours: dict[str, Tensors] = defaultdict(dict)
    for name, tensor in trained.items():
        module, _, leaf = name.rpartition(".")
        ours[module][leaf] = tensor.float()
    tensors, ranks, alphas = {}, {}, {}
    for module in ours:
        theirs, together = hf_name(f"{module}.weight", config)
        if theirs == "embed_out.weight":
            raise InputError(
                "The head of gpt_neox is embed_out or lm_head to peft, by the version of transformers. Merge instead:"
                " scripts/merge_lora.py."
            )
        theirs, together = theirs.removesuffix(".weight"), [name.removesuffix(".weight") for name in together]
        if theirs in ranks:
            continue
        change = ours[module] if len(together) == 1 else fuse(ours, together, lora, config)
        tensors |= {f"{START}{theirs}.{LEAVES[leaf]}": tensor for leaf, tensor in change.items()}
        ranks[theirs] = r = change["lora_A"].size(0)
        first = next(name for name in together if name in ours)
        alphas[theirs] = lora.scaling_of(first) * (r**0.5 if lora.rslora else r)
    lasts = {name.rsplit(".", 1)[-1] for name in ranks}
    everywhere = all(name in ranks for name in all_modules(config) if name.rsplit(".", 1)[-1] in lasts)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lasts if everywhere else ranks),
        "rank_pattern": {name: r for name, r in ranks.items() if r != lora.r},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != lora.alpha},
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "fan_in_fan_out": bool(families.definition(config.family, "TRANSPOSED")),
        "bias": "none",
    }
    save_tensors(tensors, folder / WEIGHTS, {})
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def all_modules(config: Config) -> list[str]:
    """The original's names of all linears of all blocks, and of the head."""
    return [
        name.replace("{}", str(layer), 1)
        for name in name_map_of(config)
        for layer in range(config.n_layer if "{}" in name else 1)
    ]


def fuse(ours: dict[str, Tensors], names: list[str], lora: LoRA, config: Config) -> Tensors:
    """One change of a fused linear from those of its parts `names`, of which some may not be adapted."""
    given = [name for name in names if name in ours]
    q, kv = config.n_head * config.head_size, config.n_query_groups * config.head_size
    total = q + 2 * kv if len(names) == 3 else 2 * config.intermediate_size
    rows = dict(zip(names, fused_rows([f"{name}.weight" for name in names], config, total), strict=True))
    A = torch.cat([ours[name]["lora_A"] for name in given])
    fused, start = {"lora_A": A, "lora_B": A.new_zeros(total, A.size(0))}, 0
    for name in given:
        B = ours[name]["lora_B"] * (lora.scaling_of(name) / lora.scaling_of(given[0]))
        fused["lora_B"][rows[name], start : start + B.size(1)] = B
        start += B.size(1)
    if lora.dora:
        if given != names:
            raise InputError(
                f"peft's DoRA has one magnitude for all of {', '.join(names)}, and not all are trained. Merge instead."
            )
        fused["lora_magnitude"] = A.new_zeros(total)
        for name in names:
            fused["lora_magnitude"][rows[name]] = ours[name]["lora_magnitude"]
    return fused


def load_peft(folder: Path, config: Config) -> tuple[LoRA, Tensors]:
    """Settings and weights, by our names, of an adapter that peft saved.

    Raises:
        InputError: it is no LoRA, trains something else besides, or does not fit the model.
    """
    config = config.replace(tie_embeddings=False)  # a change to the head is one, whether it is the embedding or not
    settings, file = read_json(folder / CONFIG), folder / WEIGHTS
    refuse(settings, folder)
    if not file.is_file():
        raise InputError(f"{folder} has no {WEIGHTS}. Let peft save it again, with safe_serialization.")
    found: dict[str, Tensors] = defaultdict(dict)
    leaves = {theirs: ours for ours, theirs in LEAVES.items()} | {"lora_magnitude_vector.weight": "lora_magnitude"}
    for name, tensor in read_tensors([file]):
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            continue  # peft saves a head that it adapts, as it was before
        if not (match := re.fullmatch(rf"{START}(.+)\.({'|'.join(map(re.escape, leaves))})", name)):
            raise InputError(f"{file} holds {name}, which is no part of a LoRA.")
        found[match[1]][leaves[match[2]]] = tensor.float()
    lacking = [
        f"{module}.{leaf}" for module, change in found.items() for leaf in ("lora_A", "lora_B") if leaf not in change
    ]
    if lacking:
        raise InputError(f"{file} lacks {lacking[0]}. Copy or download it again.")
    tensors, ranks, alphas = {}, {}, {}
    for module, change in found.items():
        try:
            # the rows of a fused B, and of a magnitude, are split as those of a weight
            split = dict(to_lit(f"{module}.bias", change["lora_B"], config))
            magnitudes = dict(to_lit(f"{module}.bias", change.get("lora_magnitude", change["lora_B"]), config))
        except KeyError:
            raise InputError(f"{file} changes {module}, which is in no {config.family} model.") from None
        for name, B in split.items():
            ours = name.removesuffix(".bias")
            tensors |= {f"{ours}.lora_A": change["lora_A"], f"{ours}.lora_B": B}
            if "lora_magnitude" in change:
                tensors[f"{ours}.lora_magnitude"] = magnitudes[name]
            ranks[ours] = change["lora_A"].size(0)
            with reading(folder / CONFIG):
                alphas[ours] = pattern(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"])
    with reading(folder / CONFIG):
        r, alpha = settings["r"], settings["lora_alpha"]
        lora = LoRA(
            r=r,
            alpha=alpha,
            dropout=settings.get("lora_dropout") or 0.0,
            modules=[re.escape(name) for name in ranks],
            rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != r},
            alpha_pattern={re.escape(name): value for name, value in alphas.items() if value != alpha},
            rslora=settings.get("use_rslora", False),
            dora=settings.get("use_dora", False),
        )
    return lora, tensors


def pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """As peft looks a module up: by the end of its name."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)


def refuse(settings: dict[str, Any], folder: Path) -> None:
    kind, bias = settings.get("peft_type"), settings.get("bias", "none")
    if kind != "LORA":
        raise InputError(f"{folder} holds a {kind} of peft, and only LORA can be used here.")
    unknown = [key for key in OTHERS if settings.get(key)] + [f"bias {bias!r}"] * (bias != "none")
    # other ways to begin change the base too (pissa, olora), so that it would not be the one that is loaded
    if (start := settings.get("init_lora_weights")) not in (None, True, False, "gaussian", "orthogonal", "eva"):
        unknown.append(f"init_lora_weights {start!r}")
    if unknown:
        raise InputError(f"{folder} was trained with {unknown[0]}, which is not known here. Merge it with peft.")
