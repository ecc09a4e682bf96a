"""Pre-training of the ShapeWorld pipeline from nothing: VAE, text encoder with its tokenizer, transformer."""
