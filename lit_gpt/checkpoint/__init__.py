"""Weights in, weights out: reading, writing and downloading checkpoint folders."""

from lit_gpt.checkpoint.load import build_model, load_model, load_weights

__all__ = ["build_model", "load_model", "load_weights"]
