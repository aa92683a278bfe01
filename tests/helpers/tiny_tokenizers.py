"""Small tokenizers of every kind, made on the spot, and checkpoint folders to put them in."""

import io
import json
from pathlib import Path

from lit_gpt import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and   inner\t spaces \n\n and lines\r\n",
    "don't we'll I'm 12345 3.14159 1e-5",
    "Größe naïve façade ÀÉÎ Ωμέγα Привет",
    "日本語のテキスト 你好 한국어",
    "🙂👩‍👩‍👧‍👦🇩🇪 e\u0301 a\u0308",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>",
    "def f(x):\n\treturn x ** 2  # code\n",
    "\u200b\u00a0\u3000\x00\x07",
]


def write(folder: Path, **files: str | bytes | dict) -> Path:
    """A checkpoint folder with these files; `tokenizer_json` is tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        content = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def byte_level(post_bos: bool = False, tokens: list[str] = ["<s>", "</s>"]) -> str:  # noqa: B006
    """A byte-level BPE tokenizer.json; `post_bos` makes it put <s> before every text."""
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = HF(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=tokens, vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if post_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    return tokenizer.to_str()


def metaspace(byte_fallback: bool = True) -> str:
    """A tokenizer.json as Llama-2 has it: ▁ for spaces, one before the text, and bytes for unknown characters."""
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnoprstuvwxyzé", "▁a", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = HF(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer.to_str()


def sentencepiece(**settings) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = [line for text in TEXTS for line in text.replace("\x00", "").splitlines() if line.strip()]
    llama = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", split_digits=True)
    llama |= dict(remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, hard_vocab_limit=False)
    options = dict(sentence_iterator=iter(lines), model_writer=model, vocab_size=400, minloglevel=2)
    SentencePieceTrainer.train(**options | llama | settings)
    return model.getvalue()


def of_all_kinds(folder: Path, sample_dir: Path) -> dict[str, Tokenizer]:
    """Tokenizers of both backends, written to a folder, and that of the sample."""
    return {
        "sample": Tokenizer(sample_dir),
        "byte-level": Tokenizer(write(folder / "1", tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL)),
        "metaspace": Tokenizer(write(folder / "2", tokenizer_json=metaspace(), tokenizer_config_json=SPECIAL)),
        "sentencepiece": Tokenizer(write(folder / "3", tokenizer_model=sentencepiece(), tokenizer_config_json=SPECIAL)),
    }
