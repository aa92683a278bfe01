"""Files for other programs: merged checkpoints and GGUF."""
