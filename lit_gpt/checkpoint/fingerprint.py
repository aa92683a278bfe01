"""Fingerprints of base models: what was trained on one base is refused by any other."""

import hashlib

import torch

FINGERPRINT_KEY = "lit_gpt.fingerprint"  # in a safetensors header: a copy carries the fingerprint of its original
N_SAMPLES = 64  # values of a tensor that are looked at; all of them would take as long as reading the file again


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """A tensor's name, shape and 64 evenly spaced values, as text."""
    last = tensor.numel() - 1
    positions = torch.linspace(0, last, N_SAMPLES, dtype=torch.float64)  # float32 cannot hold a large last position
    samples = tensor.flatten()[positions.long()]
    values = samples.float().tolist()
    return f"{name} {list(tensor.shape)} {values}"


def model_fingerprint(digests: dict[str, str]) -> str:
    """The sha256 of a model's tensor digests, given by name.

    Names are sorted first: the order of the tensors in their files, and into how many files they are split, makes no
    difference.
    """
    lines = [digests[name] for name in sorted(digests)]
    text = "\n".join(lines)
    return hashlib.sha256(text.encode()).hexdigest()
