"""How good a model is on each record, and whether another one is better."""
