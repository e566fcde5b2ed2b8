"""Models of transformers' own classes, so small that their text says nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def one_byte_tokens() -> Tokenizer:
    """Byte-level BPE without merges: the 256 bytes and an end."""
    names = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return tokenizer


def save_model(
    folder: Path, tokenizer: Tokenizer, *, seed: int, eos: str | None = "<eos>", padding: int = 0
) -> Path:
    """A Llama of random weights, small but whole, with this tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + padding,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=400,
        bos_token_id=None,
        eos_token_id=None if eos is None else tokenizer.token_to_id(eos),
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(folder)
    return folder
