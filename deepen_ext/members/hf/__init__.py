"""The transformers backend: models in this process, with KV caches that roll back by lane."""
