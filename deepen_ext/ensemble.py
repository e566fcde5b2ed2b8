"""The loop: members, one step of fusion, a token, and its text handed to the assistants."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from deepen_ext.anchors import Anchors, PrefixColumns, shared_anchors
from deepen_ext.cache import cache_dir
from deepen_ext.errors import DeepenError, InputError
from deepen_ext.fusion import Fuser, check_weights
from deepen_ext.generation import FinishReason, Generation, Timings
from deepen_ext.member import Member, MemberSession
from deepen_ext.models import Progress, find_device, load_member
from deepen_ext.ops.checks import check_built_for
from deepen_ext.relative_map import RelativeMap
from deepen_ext.row_sources import DEFAULT_ENTRIES, PrefixRows, Recipe, RowSource, SimilarityRows
from deepen_ext.sampler import Sampler
from deepen_ext.text import GrowingText, Utf8Stream

RECIPES = ("calibrated", "bytes", "paper")


class Ensemble:
    """Two or more language models that write one text, fused at every token by DeePEn.

    The first member is the main model: the text is made of its tokens. The others are assistants.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        weights: Sequence[float] | None = None,
        recipe: Recipe = "calibrated",
        learning_rate: float = 0.15,
        steps: int = 5,
        candidates: int = 128,
        relative_temperature: float | None = None,
        entries: int = DEFAULT_ENTRIES,
        min_probability: float = 1e-4,
        cache: bool = True,
    ) -> None:
        """Find the shared anchors and prepare a relative map for each member.

        Args:
            members: the main model first.
            weights: lambda_i, summing to 1; None for equal ones.
            recipe: "calibrated", "bytes" or "paper" (see the README).
            learning_rate: eta of the inverse search.
            steps: T of the inverse search.
            candidates: how many of a member's most probable tokens are mapped one by one.
            relative_temperature: of the similarity rows; None for the recipe's own.
            entries: how many of a row's largest entries are kept.
            min_probability: less probable tokens are not worth a row (see `Fuser`).
            cache: keep computed rows on disk, and use those of earlier runs.

        On CUDA all rows are computed here, so that no step ever waits for the device.

        Raises:
            InputError: fewer than two members, fewer than 100 shared anchors, a setting out of range, members
                on different devices, or on CUDA with a build that has no CUDA part.
        """
        if len(members) < 2:
            raise InputError(f"an ensemble needs two or more members, not {len(members)}")
        if recipe not in RECIPES:
            raise InputError(f"recipe is '{recipe}'; use one of {', '.join(RECIPES)}")
        devices = {str(member.device): member.device for member in members}
        if len(devices) > 1:
            raise InputError(
                "members are on " + " and ".join(devices) + "; fusion needs all of them on one device"
            )
        (self.device,) = devices.values()
        check_built_for(self.device)
        self.members = list(members)
        self.names = _unique_names(member.name for member in members)
        self.recipe: Recipe = recipe
        even = [1 / len(members)] * len(members)
        self.weights = check_weights(weights if weights is not None else even, len(members))
        self.anchors = shared_anchors([m.vocabulary for m in members], [m.eos_ids for m in members])
        sources = _row_sources(members, self.anchors, recipe, relative_temperature, entries)
        self.maps = [RelativeMap.from_source(source) for source in sources]
        self._fuser = Fuser(
            self.maps,
            learning_rate=learning_rate,
            steps=steps,
            candidates=candidates,
            min_probability=min_probability,
            names=self.names,
        )
        self._map_files = [_map_file(one) for one in self.maps] if cache else []
        self._rows_saved = [0] * len(self.maps)
        for relative, file in zip(self.maps, self._map_files, strict=False):
            _read_rows(relative, file)
        if self.device.type == "cuda":
            for relative in self.maps:
                relative.fill()
            self.save_rows()

    @classmethod
    def from_pretrained(
        cls,
        members: Sequence[str | Path],
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        progress: Progress | None = None,
        **settings: Any,
    ) -> Ensemble:
        """Load the members and make an ensemble of them.

        Args:
            members: hub names, local folders or `.gguf` files, the main model first.
            dtype: of all members' weights: "float32", "float16" or "bfloat16".
            device: where the models and the fusion go: "cpu", "cuda" or "cuda:1".
            progress: called with a line of text as each stage starts.
            settings: everything else `Ensemble(...)` takes: weights, recipe, learning_rate, ...

        Raises:
            InputError: fewer than two members, an unknown path, a setting out of range, or a CUDA
                device that is not there or that this build has no kernels for.
            ModelError: a model cannot be loaded, or its tokenizer fails the byte round trip.
        """
        if len(members) < 2:
            raise InputError(
                f"an ensemble needs two or more members, not {len(members)}; name at least two models"
            )
        if settings.get("weights") is not None:
            check_weights(settings["weights"], len(members))  # before minutes of loading
        where = find_device(device)
        check_built_for(where)
        loaded = [load_member(name, dtype=dtype, device=where, progress=progress) for name in members]
        if progress is not None:
            progress("Matching vocabularies")
        return cls(loaded, **settings)

    @property
    def rows_computed(self) -> int:
        """Relative rows computed since the ensemble was made, over all members."""
        return sum(one.rows_computed for one in self.maps)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continue the prompt.

        Args:
            prompt: the text so far, not empty.
            max_new_tokens: at most so many tokens of the main model.
            do_sample: draw from the fused distribution; otherwise its most probable token is taken.
            temperature: of sampling, above 0.
            top_p: sample from the smallest set of tokens with this much probability.
            seed: of sampling; the same seed gives the same text.
            stop_strings: end once the new text holds one of them.
            on_text: called with each new piece of text, whole characters only.

        Raises:
            InputError: empty prompt, setting out of range, or a prompt that with its new tokens exceeds some
                member's context; a member that gives NaN.
        """
        sampler = Sampler(
            do_sample=do_sample, temperature=temperature, top_p=top_p, seed=seed, device=self.device
        )
        stops = _stop_list(stop_strings)
        if not isinstance(prompt, str) or not prompt:
            raise InputError("the prompt is empty; give some text to continue")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; choose 1 or more")
        run = _Run(self, prompt, max_new_tokens)
        try:
            run.write(sampler, stops, on_text)
        finally:
            self.save_rows()  # also after an interrupt: what was computed is not lost
        return run.result()

    def save_rows(self) -> None:
        """Write newly computed relative rows to the cache folder, for the next run."""
        for i, (relative, file) in enumerate(zip(self.maps, self._map_files, strict=False)):
            if relative.rows_computed > self._rows_saved[i]:
                relative.save(file)
                self._rows_saved[i] = relative.rows_computed


class _Run:
    """The state of one generation."""

    def __init__(self, ensemble: Ensemble, prompt: str, max_new_tokens: int) -> None:
        self.ensemble = ensemble
        self.max_new_tokens = max_new_tokens
        self.sessions = [MemberSession(member) for member in ensemble.members]
        self.texts = [GrowingText(member.vocabulary, prompt) for member in ensemble.members]
        for member, text in zip(ensemble.members, self.texts, strict=True):
            limit = member.context_length
            if limit is not None and len(text.ids) + max_new_tokens > limit:
                raise InputError(
                    f"{member.name}: the prompt's {len(text.ids)} tokens and {max_new_tokens} new ones "
                    f"exceed its context of {limit}; shorten the prompt or ask for at most "
                    f"{max(limit - len(text.ids), 0)}"
                )
        # The main model's tokens are what was chosen; only the assistants re-tokenise.
        self.main_ids = list(self.texts[0].ids)
        self.prompt_length = len(self.main_ids)
        self.characters = Utf8Stream()
        self.pieces: list[str] = []
        self.changed = 0
        self.finish_reason: FinishReason = "length"
        self.timings = Timings(members_ms=dict.fromkeys(ensemble.names, 0.0))

    def write(self, sampler: Sampler, stops: list[str], on_text: Callable[[str], None] | None) -> None:
        """Make tokens until something ends the text."""
        start = perf_counter()
        eos = set(self.ensemble.members[0].eos_ids)
        longest_stop = max(map(len, stops), default=0)
        recent = ""
        for step in range(self.max_new_tokens):
            if not self._fits():
                self.finish_reason = "context"
                break
            token = self._next_token(sampler)
            self.timings.steps += 1
            if token in eos:
                self.finish_reason = "eos"
                break
            piece = self._hand_over(token)
            if on_text is not None and piece:
                on_text(piece)
            if step == 0:
                self._end_of_prompt(perf_counter() - start)
            recent = (recent + piece)[-(longest_stop + len(piece)) :] if stops else ""
            if any(stop in recent for stop in stops):
                self.finish_reason = "stop_string"
                break
        if rest := self.characters.finish():
            self.pieces.append(rest)
            if on_text is not None:
                on_text(rest)
        self.timings.total_ms = (perf_counter() - start) * 1e3

    def result(self) -> Generation:
        """What was written."""
        return Generation(
            text="".join(self.pieces),
            token_ids=self.main_ids[self.prompt_length :],
            finish_reason=self.finish_reason,
            changed_tokens=self.changed,
            timings=self.timings,
        )

    def _fits(self) -> bool:
        """Whether every member can read the text so far."""
        lengths = [len(self.main_ids), *(len(text.ids) for text in self.texts[1:])]
        limits = [member.context_length for member in self.ensemble.members]
        return all(limit is None or length <= limit for length, limit in zip(lengths, limits, strict=True))

    def _next_token(self, sampler: Sampler) -> int:
        logits: list[torch.Tensor | None] = []
        for i, (name, session) in enumerate(zip(self.ensemble.names, self.sessions, strict=True)):
            began = perf_counter()
            # While a character is unfinished the assistants cannot read the text: they sit out.
            sits_out = i > 0 and self.characters.pending
            ids = self.main_ids if i == 0 else self.texts[i].ids
            logits.append(None if sits_out else session.sync(ids))
            self.timings.members_ms[name] += (perf_counter() - began) * 1e3
        began = perf_counter()
        fused = self.ensemble._fuser.step(logits, self.ensemble.weights)
        ended = perf_counter()
        self.timings.fusion_ms += (ended - began) * 1e3
        (token,), (main_choice,) = fused.read(sampler(fused))
        self.timings.sampling_ms += (perf_counter() - ended) * 1e3
        self.changed += token != main_choice
        self.main_ids.append(token)
        return token

    def _hand_over(self, token: int) -> str:
        """Give the token's text to the assistants; returns the characters it completes."""
        began = perf_counter()
        piece = self.characters.feed(self.ensemble.members[0].vocabulary.bytes_of(token))
        if piece:
            self.pieces.append(piece)
            for text in self.texts[1:]:
                text.append(piece)
        self.timings.handoff_ms += (perf_counter() - began) * 1e3
        return piece

    def _end_of_prompt(self, seconds: float) -> None:
        """Put the first step's time under the prompt, so that the rest are times a token."""
        self.timings = Timings(
            steps=self.timings.steps,
            prompt_ms=seconds * 1e3,
            members_ms=dict.fromkeys(self.timings.members_ms, 0.0),
        )


def _row_sources(
    members: Sequence[Member], anchors: Anchors, recipe: Recipe, temperature: float | None, entries: int
) -> list[RowSource]:
    if recipe == "bytes":
        if temperature is not None:
            raise InputError("the bytes recipe has no temperature; leave relative_temperature out")
        prefixes = PrefixColumns(anchors, [member.vocabulary for member in members])
        return [PrefixRows(anchors, prefixes, i, device=member.device) for i, member in enumerate(members)]
    similarity = [
        SimilarityRows(member.embedding, ids, recipe=recipe, temperature=temperature, entries=entries)
        for member, ids in zip(members, anchors.token_ids, strict=True)
    ]
    if recipe == "paper":
        return list(similarity)
    prefixes = PrefixColumns(anchors, [member.vocabulary for member in members])
    return [PrefixRows(anchors, prefixes, i, rows) for i, rows in enumerate(similarity)]


def _map_file(relative: RelativeMap) -> Path:
    return cache_dir("relative-maps", "rows") / f"{relative.fingerprint}.safetensors"


def _read_rows(relative: RelativeMap, file: Path) -> None:
    """Take over an earlier run's rows. A damaged file is reported and its rows are computed anew."""
    if not file.is_file():
        return
    try:
        relative.read(file)
    except DeepenError as error:
        warnings.warn(f"{error}: its rows are computed anew and the file replaced", stacklevel=3)
        file.unlink(missing_ok=True)


def _stop_list(stop_strings: str | Sequence[str] | None) -> list[str]:
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
    if any(not isinstance(stop, str) or not stop for stop in stops):
        raise InputError("stop_strings must be non-empty strings")
    return stops


def _unique_names(names: Any) -> list[str]:
    """Members' names, numbered where two are the same (timings are by name)."""
    names = list(names)
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]
