"""MLPs: what a block does to each token by itself. A family names one of MLPS.

The legend of the shapes is in `gpt.py`."""

from collections.abc import Callable

import torch
from torch import nn

from lit_gpt.config import Config
from lit_gpt.model.fused import ACTIVATIONS, gated


class LLaMAMLP(nn.Module):
    """A gated MLP, down(activation(gate(x)) * up(x)): https://arxiv.org/abs/2002.05202"""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        size = intermediate_size or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.proj = nn.Linear(size, config.n_embd, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.project(x)
        return self.proj(gated(gate, up, self.activation))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gate before its activation, and what it gates, both (..., size), of x (..., C).

        What computes them by other linears overrides this: `fast_linears.py` has one for both.
        """
        return self.fc_1(x), self.fc_2(x)


class GptNeoxMLP(nn.Module):
    """Two linears and an activation between them: GPT-2, GPT-NeoX, Falcon, Phi."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation].forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.activation(self.fc(x)))


class LLaMAMoE(nn.Module):
    """A mixture of experts; a router sends each token through a few of them: https://arxiv.org/abs/2401.04088

    The experts are linears like any other, so that LoRA and quantization see them. Only the device knows how many
    tokens each of them gets: fetching these counts is the one place where `forward` waits for it, once per layer.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(LLaMAMLP(config, config.moe_intermediate_size) for _ in range(config.n_expert))
        self.n_chosen = config.n_expert_per_token
        self.renormalize = config.renormalize_experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # the experts of each token, and how much each of them counts
        flat = x.flatten(0, -2)  # (B * T, C)
        at_least_float32 = torch.promote_types(x.dtype, torch.float32)
        scores = self.gate(flat).softmax(-1, dtype=at_least_float32)
        weights, chosen = scores.topk(self.n_chosen)  # (B * T, n_chosen)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)

        # the tokens of expert 0, then those of expert 1, and so on
        order = chosen.flatten().argsort(stable=True)
        tokens = order // self.n_chosen
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        inputs = flat.index_select(0, tokens).split(counts)
        # also experts without tokens, if they are trained: DDP waits for the gradient of each parameter, and AdamW
        # steps with one that is zero, as in transformers, and not where there is none
        outputs = []
        for expert, rows in zip(self.experts, inputs, strict=True):
            if len(rows) or (self.training and any(param.requires_grad for param in expert.parameters())):
                outputs.append(expert(rows))
        y = torch.cat(outputs)

        # weighted, and back to where the tokens came from
        sorted_weights = weights.flatten().index_select(0, order)
        y = y * sorted_weights[:, None].to(x.dtype)
        return torch.zeros_like(flat).index_add(0, tokens, y).view_as(x)


# `mlp` in a config -> the class
MLPS: dict[str, Callable[[Config], nn.Module]] = {
    "LLaMAMLP": LLaMAMLP,
    "GptNeoxMLP": GptNeoxMLP,
    "LLaMAMoE": LLaMAMoE,
}
