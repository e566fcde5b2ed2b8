"""Attention over cached states that several query heads, or several rows, share: they are read once.

transformers' own "sdpa" repeats keys and values for every query head whenever there is a mask and more than
one new token (before 5.23: with one, too), at each layer of each step. Here the query heads that share a key
head go in as more queries of that head, which is the same product. Measured on two CPU cores, SmolLM2 (9
heads, 3 of keys), 16 rows of 256 tokens, 2 new ones each: the copies took 190 ms of a step's 430.

Rows that begin alike hold the same states for what they share. Under `states_in_common` the queries of all
meet one row's, in one product, and each row's the rest of its own; the two parts of a softmax are joined by
their normalisers (Hydragen, Juravsky et al. 2024, arXiv 2402.05099). Measured on two CPU cores (AMD EPYC,
torch 2.13), a layer of SmolLM2, 50 rows of 1,636 states, 1,400 of them common: 13.0 ms whole, 4.8 ms in two
parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "deepen_sdpa"
_MOST_QUERIES = 64  # with more, the mask repeated for each head is larger than what it saves
_FEWEST_SPARED = 1000  # states that need not be read; with fewer, two products and their join cost more

# Of the forward that is run: how many states all rows have in common, and the end of the slots looked at.
_common: ContextVar[tuple[int, int]] = ContextVar("states in common", default=(0, 0))


def share_heads(model: PreTrainedModel) -> None:
    """Have a model whose attention is "sdpa" use this module's; others are left as they are."""
    if model.config.get_text_config()._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


@contextmanager
def states_in_common(states: int, end: int) -> Iterator[None]:
    """What is run here has rows that hold the same in their first slots; on the CPU.

    Args:
        states: so many of them; 0 for none. The first row has them; every query that counts comes after
            them; the mask is additive.
        end: the end of the slots looked at: the keys of a layer are those of the last slots before it.
    """
    token = _common.set((states, end))
    try:
        yield
    finally:
        _common.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As `sdpa_attention_forward`, ``query [b, heads, n, d]``, keys and values ``[b, shared, s, d]``."""
    rows, heads, queries, _ = query.shape
    shared = key.shape[1]
    # torch.compile cannot trace a context variable: a compiled model reads all states whole.
    in_common, end = (0, 0) if torch.compiler.is_compiling() else _common.get()
    if in_common:
        in_common -= end - key.shape[2]  # a layer's window may begin within the prefix
    output = None
    if (
        attention_mask is not None
        and attention_mask.shape[1] == 1
        and not others.get("dropout")
        and all(others.get(name) is None for name in ("position_bias", "softcap", "cache"))
    ):
        if (rows - 1) * in_common >= _FEWEST_SPARED and key.shape[3] == value.shape[3]:
            output = _in_two_parts(query, key, value, attention_mask, in_common, scaling)
        elif shared < heads and queries <= _MOST_QUERIES:
            output = torch.nn.functional.scaled_dot_product_attention(
                query.reshape(rows, shared, heads // shared * queries, -1),
                key,
                value,
                attn_mask=_for_heads(attention_mask, heads // shared),
                scale=scaling,
            )
    if output is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return result
    return output.reshape(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


def _for_heads(mask: torch.Tensor, each: int) -> torch.Tensor:
    """A mask ``[b, 1, n, s]`` for the queries of so many heads ``[b, 1, each * n, s]``."""
    rows, _, queries, _ = mask.shape
    return mask.expand(rows, each, queries, -1).reshape(rows, 1, each * queries, -1)


def _in_two_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    states: int,
    scaling: float | None,
) -> torch.Tensor:
    """Of the first row the first `states`, which all have; of each row the others: ``[b, shared, n', d]``.

    With the logarithms l1, l2 of the sums of exp that the parts o1, o2 were divided by, the whole is
    (exp(l1) o1 + exp(l2) o2) / (exp(l1) + exp(l2)). torch tells them under this name only.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows, heads, queries, size = query.shape
    shared, each = key.shape[1], heads // key.shape[1]
    query = query.reshape(rows, shared, each * queries, size)
    before, after = mask[..., :states], mask[..., states:]
    first = _for_heads(before, each).reshape(1, 1, -1, states) if before.any() else None
    side_by_side = query.transpose(0, 1).reshape(1, shared, -1, size)
    common, common_sum = attend(
        side_by_side, key[:1, :, :states], value[:1, :, :states], attn_mask=first, scale=scaling
    )
    own, own_sum = attend(
        query, key[:, :, states:], value[:, :, states:], attn_mask=_for_heads(after, each), scale=scaling
    )
    common = common.reshape(shared, rows, each * queries, -1).transpose(0, 1)
    common_sum = common_sum.reshape(shared, rows, each * queries).transpose(0, 1)
    whole: torch.Tensor = own + torch.sigmoid(common_sum - own_sum)[..., None] * (common - own)
    return whole.to(query.dtype)  # the sums are float32 for every dtype


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
