"""What a run leaves behind, from its first line of hyperparameters.yaml to its report, and using it again."""
