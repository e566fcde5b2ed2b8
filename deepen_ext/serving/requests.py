"""What a text is asked for with, and what is told of it while it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from deepen_ext.decoding.generation import FinishReason
from deepen_ext.decoding.prompts import Messages
from deepen_ext.errors import DeepenError


@dataclass(frozen=True)
class Request:
    """One text that is to be written.

    Attributes:
        model: the served name: of an ensemble, or of a member alone.
        prompt: a text, a chat, or the main model's token ids (they are taken as they are).
        decoding: keywords of `Ensemble.generate` by transformers' names: max_new_tokens, do_sample,
            temperature, seed, stop_strings, ... None is as good as not given.
        fusion: settings of `Ensemble.variant` for this text alone, such as ``{"fuser": "average"}``.
        draft: as in `Ensemble.generate`; 0 for none, which is what pays beside other texts.
        top: how many candidates of the fused distribution are told at every token; 0 for none.
        prompt_top: the same of every token of the prompt; only of a member alone.
        explain: whether every token comes with its record of `decoding.trace.Trace`.
        without_template: as in `Ensemble.generate`.
    """

    model: str
    prompt: str | Messages | Sequence[int]
    decoding: Mapping[str, Any] = field(default_factory=dict)
    fusion: Mapping[str, Any] = field(default_factory=dict)
    draft: int | Literal["auto"] = 0
    top: int = 0
    prompt_top: int = 0
    explain: bool = False
    without_template: Literal["error", "plain"] = "error"


@dataclass(frozen=True)
class Candidate:
    """A token of the main model and its log-probability (natural logarithm)."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Scored:
    """A token's log-probability in the fused distribution (before processors and warpers), and the best ones.

    Attributes:
        logprob: of the token itself.
        top: the most probable tokens, the best first.
    """

    logprob: float
    top: tuple[Candidate, ...]


@dataclass(frozen=True)
class Prompted:
    """The prompt was read. Comes first, once, where `Request.prompt_top` asked for it.

    Attributes:
        ids: of the prompt.
        scored: of each of them but the first, in order.
    """

    ids: tuple[int, ...]
    scored: tuple[Scored, ...]


@dataclass(frozen=True)
class Piece:
    """A token was written.

    Attributes:
        token: the main model's id.
        text: the characters that it completes; "" while one is unfinished, and for a special token.
        scored: where `Request.top` asked for it.
        record: where `Request.explain` asked for it.
    """

    token: int
    text: str
    scored: Scored | None = None
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Ended:
    """The text has ended. Nothing comes after it.

    Attributes:
        finish_reason: see `Generation`.
        text: the rest that an unfinished character leaves; "" mostly.
        prompt_tokens: of the main model.
        completion_tokens: of the main model, a final EOS included.
        changed_tokens: see `Generation`.
        lost: see `Generation`.
    """

    finish_reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int
    changed_tokens: int
    lost: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The text cannot go on. Nothing comes after it."""

    error: DeepenError


Event: TypeAlias = Prompted | Piece | Ended | Failed
# Called in the engine's thread, in order. It must return at once and raise nothing.
Listener: TypeAlias = Callable[[Event], None]
