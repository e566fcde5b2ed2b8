"""Rotary positions whose frequencies change with the length of the text: how far they stay the same.

Models of the types "longrope" (Phi-3.5, Phi-4-mini) and "dynamic" choose their frequencies by the largest
position of a forward pass (`dynamic_rope_update` of transformers). What a KV cache holds was turned by the
frequencies of the pass that read it. Up to a limit these are the same in every pass, so that a text can be
read in pieces, beside others, and be rolled back. Beyond it all of the text would have to be read again, as
transformers' own `generate` does, once.
"""

from __future__ import annotations

from typing import Any

from deepen_ext.errors import ModelError
from deepen_ext.members.hf.loaded_model import LoadedModel, inner_model


def steady_positions(config: Any) -> int | None:
    """The longest text whose frequencies are those of every shorter one; None where they never change.

    With "longrope" they are the short factors up to `original_max_position_embeddings`, with "dynamic" those
    of the training up to `max_position_embeddings`; the limits themselves are included.

    Args:
        config: of the text model.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for part in [one for one in rope.values() if isinstance(one, dict)] or [rope]:  # one for each layer type
        if part.get("rope_type") == "longrope":
            limits.append(int(part["original_max_position_embeddings"]))
        elif part.get("rope_type") == "dynamic":
            limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)


def check_steady(loaded: LoadedModel) -> None:
    """Raise ModelError where texts may grow beyond what the frequencies stay the same for."""
    steady = steady_positions(inner_model(loaded.model).config.get_text_config())
    if steady is not None and (loaded.context_length is None or loaded.context_length > steady):
        raise ModelError(
            f"{loaded.name}: its rotary positions have other frequencies in texts of more than {steady} "
            "tokens, and what was read before would be wrong there; make the member with "
            f"context_length={steady}"
        )
