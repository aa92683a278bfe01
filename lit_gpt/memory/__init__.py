"""How much memory a step takes, found by running it on tensors without contents."""
