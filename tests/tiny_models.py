"""Models of transformers' own classes, small enough for a step in milliseconds."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sessions import changed
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from deepen_ext.measure.doctor.sample_text import SAMPLE_TEXT as PROSE
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

__all__ = [
    "AWKWARD",
    "EOS",
    "PROSE",
    "one_byte_tokens",
    "save_model",
    "tiny_main_model",
    "tiny_of_tokenizer",
    "tiny_reader",
]

EOS = 2
# Text that tokenizers cut differently, some of it inside of characters.
AWKWARD = (
    "\n日本の首都は東京です。 🙂🙃🫠 and 🦙🦙🐫 too. Antarctica's strawberries cost 1,250 € in Zürich.\n"
)


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
    folder: Path,
    tokenizer: Tokenizer,
    *,
    seed: int,
    eos: str | None = "<eos>",
    padding: int = 0,
    layers: int = 2,
) -> Path:
    """A Llama of random weights, small but whole, with this tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + padding,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=400,
        bos_token_id=None,
        eos_token_id=None if eos is None else tokenizer.token_to_id(eos),
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(folder)
    return folder


def tiny_reader(member: Member, name: str, text: str, *, seed: int, **settings: Any) -> Member:
    """The member with a model of its architecture in a few weights, which has read a text.

    The weights are random, but each token's row of the head is a mean of the states that the model has before
    that token in the text. So it writes pieces of the text: it is sure inside of a piece and torn where two
    meet, and by attention every token before counts.
    """
    config = copy.deepcopy(member.model.config)
    config.update(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": False,
            **settings,
        }
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.normal_(0, weight.shape[1] ** -0.5)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings().weight
    # Loud enough for the last token to say more than the ones before it; the first number is alike in all.
    embedding.weight.normal_(0, 1.5 / float(getattr(embedding, "embed_scale", 1)))
    embedding.weight[:, 0] = 2 * embedding.weight.std()
    ids = torch.tensor(member.vocabulary.prefix_ids + member.vocabulary.encode(text))
    states, following = model.model(ids[None]).last_hidden_state[0, :-1], ids[1:]
    sums = torch.zeros_like(head).index_add_(0, following, states)
    counts = following.bincount(minlength=len(head))
    knows = sums / counts.clamp(min=1)[:, None] ** 0.75 / states.square().sum(dim=1).mean()
    head.copy_(14 * knows + 0.1 * torch.randn_like(head))
    head[counts == 0, 0] -= 6 / states[:, 0].mean()
    return changed(member, name=name, model=model)


def tiny_of_tokenizer(folder: Path, tokenizer_folder: Path, architecture: type[PretrainedConfig]) -> Member:
    """A member with this tokenizer and a model of this architecture, for `tiny_reader` to replace.

    Args:
        folder: an empty one, for the model.
        tokenizer_folder: where the tokenizer is.
        architecture: the class of the model's config.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = architecture(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_member(folder)
