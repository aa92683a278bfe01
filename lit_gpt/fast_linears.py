"""Linears for answers: of the same values, and faster for the few rows of a token that is decoded.

Decoding reads every weight once for each token, so that its limit is the speed of memory. `prepare_for_answers` changes
a loaded model in place, and with it the layout of the weights:

    queries, keys, values       one linear instead of three         StackedAttention
    gate and up of an MLP       one instead of two                  StackedMLP
    float32 on an x86 CPU       by oneDNN                           OneDNNLinear
    DoRA                        a LoRA whose lengths are fixed      `for_answers` of the module

PyTorch multiplies in float32 by MKL. With the weights in memory, and not in a cache, oneDNN takes 0.8 to 0.95 of its
time for one row on one thread of an AMD EPYC, and half of it on two. For one row it wants weights as they lie; for
several, packed in a layout of its own: with 4 to 16 rows these take 0.4 to 0.7 of the time, but with one row 1.05 to
1.35 times as long. So the caller says for how many rows. With the many rows of a prompt both are faster than MKL. Other
devices and dtypes keep the linears they have.

The model is for answers only from then on: its state dict has other names, and nothing in it trains."""

import platform
from collections.abc import Sequence

import torch
from torch import nn

from lit_gpt.cpu_codes import CodedLinear
from lit_gpt.model.attention import CausalSelfAttention
from lit_gpt.model.fused import rotate
from lit_gpt.model.gpt import GPT
from lit_gpt.model.mlp import LLaMAMLP
from lit_gpt.replace_modules import replace_modules

PACK_FROM = 4  # rows from which a packed weight is faster


class StackedAttention(CausalSelfAttention):
    """A model's attention, with all it has under the same names, but one linear for queries, keys and values."""

    def __init__(self, attention: CausalSelfAttention) -> None:
        nn.Module.__init__(self)
        linears = (attention.q, attention.k, attention.v)
        vars(self).update(vars(attention))
        # children of its own, so that `attention` keeps its linears
        self._modules = {name: child for name, child in attention._modules.items() if name not in ("q", "k", "v")}
        self.sizes = [linear.out_features for linear in linears]
        self.n_queries, self.n_keys, self.n_values = [size // self.head_size for size in self.sizes]
        norms = (self.norm_q, self.norm_k, self.norm_v)
        self.has_norms = any(type(norm) is not nn.Identity for norm in norms)
        self.qkv = stacked(linears)

    def heads(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv = self.qkv(x)
        if self.has_norms:
            q, k, v = qkv.split(self.sizes, dim=-1)
            return self.normed_and_rotated(q, k, v, cos, sin)
        # queries and keys are rotated alike: one rotation for both
        heads = self.split_heads(qkv)  # (B, nh + 2 ng, T, hs)
        qk, v = heads.split((self.n_queries + self.n_keys, self.n_values), dim=1)
        q, k = rotate(qk, cos, sin).split((self.n_queries, self.n_keys), dim=1)
        return q, k, v


class StackedMLP(LLaMAMLP):
    """A gated MLP, with all it has under the same names, but one linear for gate and up."""

    def __init__(self, mlp: LLaMAMLP) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(mlp))
        self._modules = {"proj": mlp.proj}
        self.fc = stacked((mlp.fc_1, mlp.fc_2))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = self.fc(x).chunk(2, dim=-1)
        return gate, up


class OneDNNLinear(nn.Module):
    """y = x W^T + b by oneDNN, in float32 on a CPU. W (out, in) lies as it did, or in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear, pack_for: int | None = None) -> None:
        """Packs the weight for so many rows of x; None leaves it as it is."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        if pack_for is not None:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), pack_for)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # (..., out)


@torch.no_grad()
def prepare_for_answers(model: GPT, n_rows: int = 1, shares_weights: bool = False) -> GPT:
    """Changes a loaded model in place, so that it decodes faster, and returns it. Nothing in it trains any longer.

    `n_rows` is how many texts will be decoded at once. It decides how weights lie, and not what may be asked. A model
    that shares weights with others has them as they lie for all: nothing is stacked, packed or fixed.

    One module is changed after the other: no more than the weights of one are in memory twice, and only for a moment.
    What a method has put around a linear (LoRA, an adapter) stays around it. A head that is tied to the embedding is
    multiplied by oneDNN, too, but never packed: that would be a second copy of the embedding.

    A model that is split among devices, or whose blocks are streamed, may not be handed over.
    """
    if not shares_weights:
        replace_modules(model, fix)
        replace_modules(model, stack)
    model.requires_grad_(False)
    if not has_onednn():
        return model

    embedding = model.transformer.wte.weight
    pack_for = n_rows if n_rows >= PACK_FROM else None

    def by_onednn(name: str, module: nn.Module) -> nn.Module | None:
        if hasattr(module, "for_answers"):  # a DoRA that shares its weight, and reads it for its lengths
            return module
        if not isinstance(module, nn.Linear) or module.weight.device.type != "cpu":
            return None
        if module.weight.dtype != torch.float32:
            return None
        is_plain = shares_weights or module.weight is embedding
        return OneDNNLinear(module, None if is_plain else pack_for)

    replace_modules(model, by_onednn)
    return model


def fix(name: str, module: nn.Module) -> nn.Module | None:
    """What a module that has a faster form for answers says this is; None for all others."""
    return module.for_answers() if hasattr(module, "for_answers") else None


def stack(name: str, module: nn.Module) -> nn.Module | None:
    """A module with fewer linears in the place of this one; None if it has none that can be one."""
    # exactly these classes: an adapter's attention sends its prompt through the keys and values alone
    if type(module) is CausalSelfAttention and can_stack((module.q, module.k, module.v)):
        return StackedAttention(module)
    if type(module) is LLaMAMLP and can_stack((module.fc_1, module.fc_2)):
        return StackedMLP(module)
    return None


def can_stack(linears: Sequence[nn.Module]) -> bool:
    """Whether these linears of one input can be one: nn.Linears of one dtype, or codes of one kind."""
    first = linears[0]
    if isinstance(first, CodedLinear):
        return all(isinstance(linear, CodedLinear) and first.fits_above(linear) for linear in linears[1:])
    if any(type(linear) is not nn.Linear for linear in linears):
        return False
    kinds = {(linear.weight.dtype, linear.bias is None) for linear in linears}
    return len(kinds) == 1


def stacked(linears: Sequence[nn.Module]) -> nn.Module:
    """One linear whose output is that of all these, one after the other."""
    if isinstance(linears[0], CodedLinear):
        return CodedLinear.stacked(linears)  # type: ignore[arg-type] # all of them, see `can_stack`
    out_features = sum(linear.out_features for linear in linears)
    one = nn.Linear(linears[0].in_features, out_features, bias=False, device="meta")
    one.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if linears[0].bias is not None:
        one.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return one


def has_onednn() -> bool:
    """Whether this torch multiplies by oneDNN on this CPU faster than by its own way: on x86, where that is MKL.

    The operations are private, and those that torch.compile itself uses; a torch that has not got them keeps its own.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return is_x86 and torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
