"""What a run leaves behind, and using it again."""
