"""TODO doc of checkpoint.fingerprint"""

import hashlib

import torch

FINGERPRINT = "lit_gpt.fingerprint"  # in a safetensors header, where a copy says what it is a copy of


def digest(name: str, tensor: torch.Tensor) -> str:
    """A tensor's name, shape and 64 evenly spaced values."""
    values = tensor.flatten()[torch.linspace(0, tensor.numel() - 1, 64, dtype=torch.float64).long()]
    return f"{name} {list(tensor.shape)} {values.float().tolist()}"


def fingerprint(digests: dict[str, str]) -> str:
    """sha256 of a base model, whatever the order of its tensors. An adapter is refused by any other base."""
    return hashlib.sha256("\n".join(digests[name] for name in sorted(digests)).encode()).hexdigest()
