"""TODO doc of generate.answers"""

from typing import NamedTuple

import torch

from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prompts import render
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.generate.decode import stream
from lit_gpt.model.gpt import GPT


class Answered(NamedTuple):
    question: str
    """The prompt without what the style puts around it."""
    expected: str
    answer: str


def answers(model: GPT, tokenizer: Tokenizer, dataset: Dataset, n: int, max_new_tokens: int = 60) -> list[Answered]:
    """The greedy answers to the first n prompts of a dataset."""
    was_training, device = model.training, model.transformer.wte.weight.device
    model.eval()
    answered = []
    for i in range(min(n, len(dataset))):
        prompt, expected = dataset.question(i)
        room = min(len(prompt) + max_new_tokens, model.config.block_size)
        new = list(stream(model, prompt.to(device), room, temperature=0.0, eos_id=tokenizer.stop_ids))
        texts = tokenizer.decode(expected), tokenizer.decode(new)
        answered.append(Answered(bare_question(prompt, tokenizer, dataset), *(text.strip() for text in texts)))
    model.train(was_training)
    return answered


def bare_question(prompt: torch.Tensor, tokenizer: Tokenizer, dataset: Dataset) -> str:
    """A prompt for people to read: without the template around it."""
    mark = "\x00"
    around = render(dataset.meta["prompt_style"], {"instruction": mark}, tokenizer).text
    before, _, after = around.partition(mark)
    return tokenizer.decode_with_special(prompt.tolist()).removeprefix(before).removesuffix(after).strip()
