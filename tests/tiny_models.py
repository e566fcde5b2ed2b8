"""A main model for tests of settings: transformers' own class, so small that its text says nothing."""

from __future__ import annotations

from types import SimpleNamespace

from transformers import LlamaConfig, LlamaForCausalLM

EOS = 2


def tiny_main_model(vocab_size: int = 300) -> SimpleNamespace:
    """What `Settings.read` looks at of a Member."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=EOS,
    )
    return SimpleNamespace(model=LlamaForCausalLM(config).eval(), vocab_size=vocab_size, eos_ids=(EOS,))
