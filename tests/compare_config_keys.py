"""Compares our reading of config.json with transformers', key by key and family by family.

    python tests/compare_config_keys.py                 # a quarter of an hour
    python tests/compare_config_keys.py --keys removed  # a minute
    python tests/compare_config_keys.py --cases gemma

Of every case in tests/helpers/families.py each key of config.json is left out once. Of one case for each model_type,
each key that any family knows gets other values, also in families that do not know it, and the rotary parameters are
written in every form. What transformers computes, we have to compute, or to refuse for a reason in REFUSALS of
tests/helpers/config_keys.py. It ends with the counts, and with exit status 1 if something differs.
tests/test_config_keys.py is a part of this.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from helpers.config_keys import (
    DIFFERENT,
    ONE_OF_EACH,
    OUTCOMES,
    READ_IN_OTHER_SHAPES,
    REFUSALS,
    REFUSED_BY_US,
    TinyModel,
    changes,
    removals,
)
from helpers.families import CASES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name has this in it")
    parser.add_argument("--keys", choices=("removed", "changed", "all"), default="all")
    arguments = parser.parse_args()

    counts: dict[str, Counter[str]] = {"removed": Counter(), "changed": Counter()}
    n_wrong = 0
    for name, (kind, settings) in CASES.items():
        if arguments.cases not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            model = TinyModel(kind, settings, Path(folder))
            for how, variants in (("removed", removals), ("changed", changes)):
                if arguments.keys not in (how, "all") or (how == "changed" and name not in ONE_OF_EACH):
                    continue
                for what, hf in variants(model.hf):
                    outcome, said = model.compare(hf)
                    counts[how][outcome] += 1
                    if is_wrong(outcome, said):
                        n_wrong += 1
                        print(f"{name}, {what} {how}: {outcome}: {said}", flush=True)

    print(f"{'keys':<35}{'removed':>8}{'changed':>9}")
    for outcome in OUTCOMES:
        print(f"{outcome:<35}{counts['removed'][outcome]:>8,}{counts['changed'][outcome]:>9,}")
    print(f"{'all':<35}{counts['removed'].total():>8,}{counts['changed'].total():>9,}")
    return 1 if n_wrong else 0


def is_wrong(outcome: str, said: str) -> bool:
    """Whether we read a config.json in another way than transformers, or refuse it without a reason."""
    if outcome == REFUSED_BY_US:
        return not any(re.search(pattern, said) for pattern in REFUSALS)
    return outcome in (DIFFERENT, READ_IN_OTHER_SHAPES)


if __name__ == "__main__":
    sys.exit(main())
