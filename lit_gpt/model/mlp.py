"""TODO doc of model.mlp"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.config import Config


class LLaMAMLP(nn.Module):
    """Gated: https://arxiv.org/abs/2002.05202"""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        size = intermediate_size or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.proj = nn.Linear(size, config.n_embd, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.activation(self.fc_1(x)) * self.fc_2(x))


class GptNeoxMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.activation(self.fc(x)))


class LLaMAMoE(nn.Module):
    """Each token goes through the few experts that a router gives it: Mixtral, https://arxiv.org/abs/2401.04088

    The experts are linears like any other, so that LoRA and quantization see them. Their shares of the tokens are
    known to the device alone: fetching them is the one place where `forward` waits for it, once per layer.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(LLaMAMLP(config, config.moe_intermediate_size) for _ in range(config.n_expert))
        self.n_chosen, self.renormalize = config.n_expert_per_token, config.renormalize_experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)  # (T, C)
        scores = self.gate(flat).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, chosen = scores.topk(self.n_chosen)  # (T, n_chosen)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # the tokens of expert 0, then those of 1 ...
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = flat.index_select(0, order // self.n_chosen).split(counts)
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        done = done * weights.flatten().index_select(0, order)[:, None].to(x.dtype)
        return torch.zeros_like(flat).index_add(0, order // self.n_chosen, done).view_as(x)


MLPS = {"LLaMAMLP": LLaMAMLP, "GptNeoxMLP": GptNeoxMLP, "LLaMAMoE": LLaMAMoE}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
