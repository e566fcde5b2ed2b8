"""What a fuser and its settings ask of the members' backends, refused by name before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.settings import FusionSettings
from deepen_ext.members.backend import Backend, require


def check_capabilities(backends: Sequence[Backend], kind: type[Fuser], settings: FusionSettings) -> None:
    """Refuse members that cannot give what the ensemble would ask of them.

    Args:
        backends: the members', the main model's first.
        kind: the fuser's class.
        settings: the ensemble's.

    Raises:
        InputError: a member without full logits that the fuser or weights by the prompt need. The message has
            the member's name and says what to do. A recipe's embeddings are asked for by `MemberMaps`.
    """
    name = f"fuser='{kind.name}'" if kind.name else "a function as fuser"
    for number, backend in enumerate(backends):
        if kind.assistants_need_logits if number else kind.main_needs_logits:
            require(backend, "logits", name)
        if settings.weights_rule and len(backends) > 1:
            require(backend, "logits", f"weights='{settings.weights_rule}'")
