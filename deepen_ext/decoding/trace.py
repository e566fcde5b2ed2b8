"""Every token explained: one record for each, with what each member said and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any, Protocol

from deepen_ext import ops
from deepen_ext.decoding.accept import Accepted
from deepen_ext.decoding.team import Team
from deepen_ext.errors import InputError, ModelError
from deepen_ext.fusers import FusedStep, Part
from deepen_ext.ground.paths import user_path
from deepen_ext.ground.private_file import open_private

_TOP = 5  # candidates shown of each member


class Observer(Protocol):
    """Is told every token of a run."""

    def step(
        self,
        team: Team,
        fused: FusedStep,
        accepted: Sequence[Accepted],
        ms: Mapping[str, Any],
        lost: Sequence[str] = (),
    ) -> None:
        """A step gave these tokens. What is fused may be written over afterwards."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


class Trace:
    """Makes a record of every token and gives it to a function, or writes it as a line of JSON.

    A record has ``row`` (the text's number) and ``position`` (of the token among its new ones); ``token`` and
    ``main_choice`` (``id`` and ``text``; ``bytes`` in hexadecimal too, where these are no whole characters);
    ``text``, the characters that the token completed ("" while one is unfinished); ``not_asked``, why the
    assistants had no say (null where they had); ``members``, of those that spoke ``name``, ``weight`` (scaled
    to those present) and ``top``, their most probable tokens with probabilities; ``fused``, the same after
    the fusion, before processors and warpers; ``draft``, what became of a token that was written ahead:
    "stood", "replaced" or "settled" (null where none was); ``lost``, the names of the members that were lost
    before (`on_failure="continue"`); and ``ms``, the step's milliseconds by stage, which its tokens share.
    """

    def __init__(self, target: str | Path | Callable[[dict[str, Any]], object]) -> None:
        """Open the file, or take the function. A new file is its owner's alone: it has what was written.

        Raises:
            InputError: the file cannot be written.
        """
        self._file: IO[Any] | None = None
        if callable(target):
            self._give = target
            return
        if not isinstance(target, str | PathLike):
            raise InputError(f"trace is of type {type(target).__name__}; give a file's name, or a function")
        try:
            self._file = open_private(user_path(target), "w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"the trace cannot be written to {target}: {error.strerror}") from error
        self._give = self._write_line

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def step(
        self,
        team: Team,
        fused: FusedStep,
        accepted: Sequence[Accepted],
        ms: Mapping[str, Any],
        lost: Sequence[str] = (),
    ) -> None:
        """Record the tokens that a step gave, without the members that were lost."""
        parts = [_readable(part) for part in fused.parts]
        top = ops.topk_softmax(fused.logits, min(_TOP, fused.logits.shape[1]))
        fused_ids, fused_probs = top.ids.tolist(), top.probs.tolist()
        main_choices, shares_by_row = fused.main_choice.tolist(), fused.shares
        for one in accepted:
            i = one.row
            spoke = [(part, said[i]) for part, said in zip(fused.parts, parts, strict=True) if i in said]
            shares = shares_by_row[i] or (1.0,)
            weights = {part.member: share for part, share in zip(fused.parts, shares, strict=False)}
            self._give(
                {
                    "row": one.written.number,
                    "position": one.position,
                    "token": _token(team, 0, one.token),
                    "main_choice": _token(team, 0, main_choices[i]),
                    "text": one.written.text,
                    "not_asked": one.proposal.place.reason,
                    "draft": one.fate,
                    "members": [
                        {
                            "name": team.names[part.member],
                            "weight": weights.get(part.member, 0.0),
                            "top": _candidates(team, part.member, *said),
                        }
                        for part, said in spoke
                    ],
                    "lost": list(lost),
                    "fused": _candidates(team, 0, fused_ids[i], fused_probs[i]),
                    "ms": dict(ms),
                }
            )

    def _write_line(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()  # a run that is killed leaves whole lines
        except OSError as error:
            with suppress(OSError):  # what could not be written is tried again
                self._file.close()
            raise ModelError(
                f"{self._file.name}: the trace cannot be written to ({error.strerror}); make room, or name "
                "another file"
            ) from error


def _readable(part: Part) -> dict[int, tuple[list[int], list[float]]]:
    """The part's top tokens on the host, by row of the step."""
    ids, probs = part.topk.ids[:, :_TOP].tolist(), part.topk.probs[:, :_TOP].tolist()
    return dict(zip(part.rows, zip(ids, probs, strict=True), strict=True))


def _candidates(team: Team, member: int, ids: Sequence[int], probs: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {**_token(team, member, token), "probability": round(probability, 6)}
        for token, probability in zip(ids, probs, strict=True)
    ]


def _token(team: Team, member: int, token: int) -> dict[str, Any]:
    """Id and text; a special token has none, part of a character shows as U+FFFD, beside the bytes."""
    data = team.members[member].vocabulary.bytes_of(token)
    text = data.decode(errors="replace")
    found = {"id": token, "text": text}
    return found if text.encode() == data else found | {"bytes": data.hex()}
