"""What fine-tuning took elsewhere, and what it is planned to take here: one line for each published figure.

    python tests/benchmarks/memory_history.py

History, not a check: those programs differ in what they keep (padding, logits of the whole prompt, a copy of the head),
and no plan has been compared with a GPU. All with LoRA of rank 8 on query and value, or an adapter, in bfloat16 on one
A100: lit-gpt's tables of October 2023 with the longest record of Alpaca, and the adapters of litgpt's of 2026; those
called A10G are litgpt's config_hub with 512 tokens. The last column is of the last plan in its row.
"""

import argparse
from dataclasses import replace

from lit_gpt import Config
from lit_gpt.adapter import Adapter
from lit_gpt.lora import LoRA
from lit_gpt.memory.plan import Setup, plan

KINDS = (None, "bnb.nf4", "bnb.nf4-dq")
PUBLISHED = {  # (model, method, tokens, records at once): GB for each kind
    ("phi-1_5", "lora", 1044, 1): (4.82, 3.78, 3.72),
    ("phi-1_5", "lora", 1044, 2): (6.76, None, None),
    ("phi-1_5", "lora", 1044, 4): (10.68, None, None),
    ("stablelm-base-alpha-3b", "lora", 1034, 1): (9.69, 6.35, 6.19),
    ("stablelm-base-alpha-3b", "lora", 1034, 2): (12.10, None, None),
    ("stablelm-base-alpha-3b", "lora", 1034, 4): (16.92, None, None),
    ("stablelm-base-alpha-3b", "adapter", 1034, 1): (9.10, 5.65, 5.48),
    ("stablelm-base-alpha-3b", "adapter_v2", 1034, 1): (10.71, 7.41, 7.25),
    ("Llama-2-7b-hf", "lora", 1304, 1): (21.30, 14.14, 13.84),
    ("Llama-2-7b-hf", "lora", 1304, 2): (29.07, None, None),
    ("Llama-2-7b-hf", "adapter", 1304, 1): (19.98, 12.68, 12.38),
    ("Llama-2-7b-hf", "adapter_v2", 1304, 1): (25.51, 18.30, 17.98),
    ("Llama-2-13b-hf", "lora", 1304, 1): (38.12, 23.14, 22.55),
    ("falcon-7b", "lora", 1079, 1): (23.52, None, None),
    ("falcon-7b", "lora", 256, 1): (15.73, None, None),
    ("falcon-7b", "lora", 512, 1): (16.69, 9.44, None),  # from here on A10G
    ("Llama-2-7b-hf", "lora", 512, 2): (19.77, 13.68, None),
    ("Mistral-7B-v0.1", "lora", 512, 2): (20.66, 14.29, None),
    ("Llama-3.2-1B", "lora", 512, 1): (4.49, None, None),
    ("Llama-3.2-1B", "lora", 512, 2): (None, 5.53, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("| model | method | tokens | bfloat16 | plan | nf4 | plan | nf4-dq | plan | plan, blocks recomputed |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for (name, method, tokens, n_records), published in PUBLISHED.items():
        settings = LoRA(key=False, projection=False, mlp=False) if method == "lora" else Adapter()
        lengths = (tokens,) * n_records
        setup = Setup(Config.from_name(name), method, settings, lengths=lengths)
        cells = [name, method, f"{n_records} x {tokens:,}"]

        # what was published for a kind of weights, beside the plan for it
        for kind, gb in zip(KINDS, published):
            if gb is None:
                cells += ["", ""]
                continue
            setup = replace(setup, quantize=kind)
            cells += [f"{gb:.2f}", f"{plan(setup).gb:.2f}"]

        # the last of these kinds, with less memory
        recomputed = replace(setup, activation_checkpointing="block")
        cells.append(f"{plan(recomputed).gb:.2f}")
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
