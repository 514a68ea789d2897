"""Encoder-decoder models: families, layer choice, shrinking, freezing, loading and tokenizers."""
