"""TODO doc of generate.sampling"""

import torch


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The next token (B, 1) from logits (B, V). Temperature 0 takes the likeliest.

    top_k keeps the k likeliest; top_p the fewest likeliest that together have that probability
    (https://arxiv.org/abs/1904.09751), after the temperature.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        values, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = values.cumsum(-1) - values >= top_p  # what comes before it already has enough; the first stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
