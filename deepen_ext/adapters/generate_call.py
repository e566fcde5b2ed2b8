"""What a logits processor is not told of the `generate` that calls it: read in the frames of that call."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

import torch
from transformers import GenerationMixin
from transformers.generation import candidate_generator

from deepen_ext.errors import InputError

GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


class GenerateCall(NamedTuple):
    """One call of transformers' `generate`.

    Attributes:
        prompts: ids [B, L] as it was given them, padding included, repeated for beams.
        mask: of the prompts [B, L], 0 where padding is; None where nothing is.
    """

    prompts: torch.Tensor
    mask: torch.Tensor | None


def generate_call() -> GenerateCall | None:
    """The `generate` that runs in this thread; None where something else calls the processor.

    Raises:
        InputError: its prompts are embeddings, or padded on the right.
    """
    frame = next((frame for frame in _frames() if frame.f_code is GENERATE), None)
    if frame is None:
        return None
    inputs = frame.f_locals["model_kwargs"]
    if inputs.get("inputs_embeds") is not None:
        raise InputError(
            "the logits processor has no use for inputs_embeds: the assistants read text, which embeddings "
            "have not; give input_ids"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and bool((mask[:, -1] == 0).any()):
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise InputError(f"prompt {row} is padded on the right; pad on the left (padding_side='left')")
    return GenerateCall(frame.f_locals["input_ids"], mask)


def is_drafting() -> bool:
    """Whether the scores are for a draft, whose tokens `generate` will check (assisted decoding).

    A draft model's own `generate` calls the processors too, and prompt lookup calls them with made-up scores.
    """
    return any(frame.f_globals.get("__name__") == candidate_generator.__name__ for frame in _frames())


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
