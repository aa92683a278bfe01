"""Attribution: which training records made a fine-tuned model what it is."""
