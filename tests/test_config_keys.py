"""Keys of config.json mean what they mean to transformers: `pytest tests/test_config_keys.py`, about 30 s

`python tests/compare_config_keys.py` tries twenty times as many.
"""

from collections import Counter
from dataclasses import fields

import pytest
from compare_config_keys import is_wrong
from helpers.config_keys import ONE_OF_EACH, OUTCOMES, TinyModel, changes, removals
from helpers.families import CASES

from lit_gpt import families

COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module", params=ONE_OF_EACH, ids=lambda case: case.replace(" ", "_"))
def model(request, tmp_path_factory) -> TinyModel:
    return TinyModel(*CASES[request.param], tmp_path_factory.mktemp("config_keys"))


def test_each_key_left_out(model) -> None:
    """Every key of config.json once, also those of the rotary parameters."""
    wrong = []
    for key, hf in removals(model.hf):
        outcome, said = model.compare(hf)
        COUNTS[outcome] += 1
        if is_wrong(outcome, said):
            wrong.append(f"{key}: {outcome}: {said}")
    assert not wrong


OTHER_VALUES = (  # of the changes that compare_config_keys.py tries, those that were read in another way
    "rms_norm_eps=0.05", "hidden_act=relu", "clip_qkv=0.0", "partial_rotary_factor=0.5", "head_dim=16",
    "num_experts=3", "tie_word_embeddings=True", "no rotary key", "a window in some layers", "a window, no layer_types",
    "linear: both, contradicting", "llama3, no length: old", "yarn, no length: old, length at the top",
)  # fmt: skip


def test_another_value(model) -> None:
    """Of keys that the family knows, and of keys that it does not."""
    variants = dict(changes(model.hf))
    outcomes = {what: model.compare(variants[what]) for what in OTHER_VALUES}
    wrong = {what: outcome for what, outcome in outcomes.items() if is_wrong(*outcome)}
    assert not wrong


def test_what_was_tried(capsys) -> None:
    """The counts of the first test."""
    assert {CASES[case][0] for case in ONE_OF_EACH} == {kind for kind, _ in CASES.values()}
    with capsys.disabled():
        counts = ", ".join(f"{COUNTS[outcome]} {outcome}" for outcome in OUTCOMES if COUNTS[outcome])
        print(f"\n{COUNTS.total()} keys of {len(ONE_OF_EACH)} model types left out: {counts}")


# ---- the defaults themselves

BUT_IN_CODE = {  # defaults that transformers has in the code of a config, and not as a field
    "rope_theta", "partial_rotary_factor", "rotary_emb_base", "rotary_pct", "rope_local_base_freq",
    "sliding_window_pattern", "head_dim", "hidden_act", "num_key_value_heads", "max_position_embeddings",
    "layer_types",  # of Mistral, which is a Ministral with them
}  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(families.families_by_model_type()))
def test_defaults_are_those_of_transformers(model_type) -> None:
    """Also the numbers that a tiny model cannot show, such as a window of 4,096."""
    from transformers import AutoConfig

    family = families.families_by_model_type()[model_type]
    left_out = families.definition(family, "LEFT_OUT")
    if model_type not in left_out:
        is_former = model_type in families.definition(family, "FORMER_MODEL_TYPES")
        assert is_former or model_type == "gemma3"  # of which the one with images is refused
        return
    config = AutoConfig.for_model(model_type)
    defaults = {spec.name: spec.default for spec in fields(config)}
    rope = config.rope_parameters or {} if hasattr(config, "rope_parameters") else {}
    rope = rope.get("full_attention", rope) | {"rope_local_base_freq": rope.get("sliding_attention")}
    known = (families.LEFT_OUT | left_out[model_type]).items()
    for key, value in known:
        if key in defaults:
            assert defaults[key] == value, key
        elif key == "rope_local_base_freq":
            assert rope[key]["rope_theta"] == value
        elif key in rope:
            assert rope[key] == value, key
        elif key in ("rotary_emb_base", "rotary_pct"):
            assert value == rope[{"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}[key]]
        else:
            assert key in BUT_IN_CODE, key
