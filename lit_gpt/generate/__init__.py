"""From a prompt to an answer."""

from lit_gpt.generate.decode import generate, stream
from lit_gpt.generate.sampling import sample

__all__ = ["generate", "sample", "stream"]
