"""GGUF files: their headers, checked; what they say about the model; their tokenizers."""
