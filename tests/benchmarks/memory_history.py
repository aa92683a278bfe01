"""What fine-tuning took elsewhere, and what it is planned to take here: one line for each published figure.

    python tests/benchmarks/memory_history.py

History, not a check: those programs differ in what they keep (padding, logits of the whole prompt, a copy of the head),
and no plan has been compared with a GPU. All with LoRA of rank 8 on query and value, or an adapter, in bfloat16 on one
A100: lit-gpt's tables of October 2023 with the longest record of Alpaca, and the adapters of litgpt's of 2026; those
called A10G are litgpt's config_hub with 512 tokens.
"""

from lit_gpt import Config
from lit_gpt.adapter import Adapter
from lit_gpt.lora import LoRA
from lit_gpt.memory import Setup, plan

PUBLISHED = {  # (model, tokens): {(method, quantization, records at once): GB}
    ("phi-1_5", 1044): {
        ("lora", None, 1): 4.82, ("lora", "bnb.nf4", 1): 3.78, ("lora", "bnb.nf4-dq", 1): 3.72,
        ("lora", None, 2): 6.76, ("lora", None, 4): 10.68,
    },
    ("stablelm-base-alpha-3b", 1034): {
        ("lora", None, 1): 9.69, ("lora", "bnb.nf4", 1): 6.35, ("lora", "bnb.nf4-dq", 1): 6.19,
        ("lora", None, 2): 12.10, ("lora", None, 4): 16.92,
        ("adapter", None, 1): 9.10, ("adapter", "bnb.nf4", 1): 5.65, ("adapter", "bnb.nf4-dq", 1): 5.48,
        ("adapter_v2", None, 1): 10.71, ("adapter_v2", "bnb.nf4", 1): 7.41, ("adapter_v2", "bnb.nf4-dq", 1): 7.25,
    },
    ("Llama-2-7b-hf", 1304): {
        ("lora", None, 1): 21.30, ("lora", "bnb.nf4", 1): 14.14, ("lora", "bnb.nf4-dq", 1): 13.84,
        ("lora", None, 2): 29.07,
        ("adapter", None, 1): 19.98, ("adapter", "bnb.nf4", 1): 12.68, ("adapter", "bnb.nf4-dq", 1): 12.38,
        ("adapter_v2", None, 1): 25.51, ("adapter_v2", "bnb.nf4", 1): 18.30, ("adapter_v2", "bnb.nf4-dq", 1): 17.98,
    },
    ("Llama-2-13b-hf", 1304): {
        ("lora", None, 1): 38.12, ("lora", "bnb.nf4", 1): 23.14, ("lora", "bnb.nf4-dq", 1): 22.55,
    },
    ("falcon-7b", 1079): {("lora", None, 1): 23.52},
    ("falcon-7b", 256): {("lora", None, 1): 15.73},
    ("falcon-7b", 512): {("lora", None, 1): 16.69, ("lora", "bnb.nf4", 1): 9.44},  # from here on A10G
    ("Llama-2-7b-hf", 512): {("lora", None, 2): 19.77, ("lora", "bnb.nf4", 2): 13.68},
    ("Mistral-7B-v0.1", 512): {("lora", None, 2): 20.66, ("lora", "bnb.nf4", 2): 14.29},
    ("Llama-3.2-1B", 512): {("lora", None, 1): 4.49, ("lora", "bnb.nf4", 2): 5.53},
}  # fmt: skip


def main() -> None:
    print("| model | method | quantized | records | tokens | published | plan | with block checkpointing |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for (name, tokens), rows in PUBLISHED.items():
        for (method, quantize, n), published in rows.items():
            settings = LoRA() if method == "lora" else Adapter()
            setup = dict(settings=settings, quantize=quantize, lengths=(tokens,) * n)
            config = Config.from_name(name)
            plans = (plan(Setup(config, method, **setup, activation_checkpointing=how)).gb for how in ("none", "block"))
            cells = (name, method, quantize or "", n, f"{tokens:,}", f"{published:.2f}", *(f"{gb:.2f}" for gb in plans))
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
