"""What a model can do: its losses and its answers on texts that it was not trained on."""
