"""GGUF files for tests: tiny models with random weights, and float32 copies of real ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from deepen_ext.members.gguf.header import read_header
from deepen_ext.members.gguf.tensors import dense_tensor
from deepen_ext.members.llama_cpp.backend import LlamaBackend
from deepen_ext.members.llama_cpp.context import Context, Feed

HIDDEN, INNER, HEADS, KV_HEADS, WIDTH = 32, 48, 4, 2, 8
WINDOW = 16


def write_tiny_model(
    path: Path,
    family: str,
    *,
    vocab_size: int,
    context_length: int,
    seed: int = 0,
    kind: Kind = Kind.F32,
    tokens: bool = False,
) -> Path:
    """A model of random weights in which every token of a text counts and tokens 10n and 10n + 1 tie.

    "llama" has two layers; "gemma3" six, of which llama.cpp gives all but the last a window; "mamba", whose
    states cannot be cut, one. The files have no tokenizer, or with `tokens` one of single characters, as a
    server needs it.
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, family)
    writer.add_name(f"tiny {family}")
    writer.add_context_length(context_length)
    writer.add_vocab_size(vocab_size)
    if tokens:
        _add_tokens(writer, vocab_size)
    else:
        writer.add_tokenizer_model("none")
    writer.add_embedding_length(HIDDEN)
    writer.add_layer_norm_rms_eps(1e-6)
    blocks = {"llama": 2, "gemma3": 6, "mamba": 1}[family]
    writer.add_block_count(blocks)
    embedding = _normal(random, vocab_size, HIDDEN)
    embedding[1::10] = embedding[0::10][: len(embedding[1::10])]
    weights = {"token_embd.weight": embedding, "output_norm.weight": np.ones(HIDDEN, np.float32)}
    add = _add_mamba if family == "mamba" else _add_attention
    for block in range(blocks):
        weights |= {f"blk.{block}.{name}": one for name, one in add(writer, family, random, block).items()}
    for name, one in weights.items():
        own = kind if one.ndim > 1 and one.shape[-1] % 32 == 0 else Kind.F32
        writer.add_tensor(name, gguf.quants.quantize(one, own), raw_dtype=own)
    return _written(writer, path)


def _add_tokens(writer: gguf.GGUFWriter, count: int) -> None:
    letters = [chr(one) for one in range(ord("!"), ord("~") + 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*letters, *(2 * one for one in letters)][:count])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges([f"{one} {one}" for one in letters][: count - len(letters)])
    writer.add_eos_token_id(count - 1)
    writer.add_add_bos_token(False)


def _add_attention(writer: gguf.GGUFWriter, family: str, random: np.random.Generator, block: int) -> dict:
    if block == 0:
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_key_length(WIDTH)
        writer.add_value_length(WIDTH)
        writer.add_rope_freq_base(10000.0)
        if family == "gemma3":
            writer.add_sliding_window(WINDOW)
    weights = {
        "attn_q.weight": _normal(random, HEADS * WIDTH, HIDDEN),
        "attn_k.weight": _normal(random, KV_HEADS * WIDTH, HIDDEN),
        "attn_v.weight": _normal(random, KV_HEADS * WIDTH, HIDDEN),
        "attn_output.weight": _normal(random, HIDDEN, HEADS * WIDTH),
        "ffn_gate.weight": _normal(random, INNER, HIDDEN),
        "ffn_up.weight": _normal(random, INNER, HIDDEN),
        "ffn_down.weight": _normal(random, HIDDEN, INNER),
        "attn_norm.weight": np.ones(HIDDEN, np.float32),
        "ffn_norm.weight": np.ones(HIDDEN, np.float32),
    }
    if family == "gemma3":
        weights |= {f"attn_{one}_norm.weight": np.ones(WIDTH, np.float32) for one in "qk"}
        weights |= {f"post_{one}_norm.weight": np.ones(HIDDEN, np.float32) for one in ("attention", "ffw")}
    return weights


def _add_mamba(writer: gguf.GGUFWriter, _: str, random: np.random.Generator, block: int) -> dict:
    inner, state, rank, kernel = 2 * HIDDEN, 8, 4, 4
    if block == 0:
        writer.add_ssm_conv_kernel(kernel)
        writer.add_ssm_inner_size(inner)
        writer.add_ssm_state_size(state)
        writer.add_ssm_time_step_rank(rank)
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
    return {
        "attn_norm.weight": np.ones(HIDDEN, np.float32),
        "ssm_in.weight": _normal(random, 2 * inner, HIDDEN),
        "ssm_conv1d.weight": _normal(random, inner, kernel),
        "ssm_conv1d.bias": np.zeros(inner, np.float32),
        "ssm_x.weight": _normal(random, rank + 2 * state, inner),
        "ssm_dt.weight": _normal(random, inner, rank),
        "ssm_dt.bias": np.zeros(inner, np.float32),
        "ssm_a": -np.tile(np.arange(1, state + 1, dtype=np.float32) / 200, (inner, 1)),  # a long memory
        "ssm_d": np.ones(inner, np.float32),
        "ssm_out.weight": _normal(random, HIDDEN, inner),
    }


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return (random.standard_normal(shape) * 0.4).astype(np.float32)


def dequantised(source: Path, target: Path) -> Path:
    """The same model with its weights as float32, which are those that its blocks stand for.

    The settings are copied as they lie: the gguf package takes half a minute to read a large vocabulary.
    """
    header = read_header(source)
    assert header.settings.get("general.alignment", _padded(1)) == _padded(1)
    weights = {name: dense_tensor(source, name).numpy() for name in header.tensors}
    with source.open("rb") as file:
        head = file.read(header.settings_end)
    offset = 0
    for name, one in weights.items():
        key = name.encode()
        sides = one.shape[::-1]
        form = f"<Q{len(key)}sI{len(sides)}QIQ"
        head += struct.pack(form, len(key), key, len(sides), *sides, Kind.F32, offset)
        offset += _padded(one.nbytes)
    with target.open("wb") as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for one in weights.values():
            file.write(one.tobytes().ljust(_padded(one.nbytes), b"\0"))
    return target


def _padded(size: int) -> int:
    """Rounded up to GGUF's usual alignment."""
    return -(-size // 32) * 32


def plain_model(path: Path) -> torch.nn.Module:
    """transformers' own model of a GGUF file, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "scaling"):  # of Gemma's heads, which transformers takes to be 256 wide
            module.scaling = WIDTH**-0.5
    return model.eval().requires_grad_(False)


def _written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class CountingLlama(LlamaBackend):
    """Counts the tokens that its contexts are fed."""

    tokens = 0

    def new_context(self, sequences: int, room: int) -> Context:
        context = super().new_context(sequences, room)

        def counted(feeds: Sequence[Feed]) -> torch.Tensor:
            self.tokens += sum(len(feed.ids) for feed in feeds)
            return Context.decode(context, feeds)

        context.decode = counted
        return context
