"""The ensemble: members, their anchors and relative maps, and the ways to make them write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from transformers import GenerationConfig

from deepen_ext.decoding.boundary import BoundaryRule
from deepen_ext.decoding.generation import BatchGeneration, Generation
from deepen_ext.decoding.loop import Run
from deepen_ext.decoding.prompts import Messages, Prompts, is_batch, read_prompts
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.decoding.stream import TextStream
from deepen_ext.decoding.team import Team
from deepen_ext.errors import InputError
from deepen_ext.fusers import FUSERS, FuseFunction, Fuser, make_fuser, method_name, on_relative_maps
from deepen_ext.fusers.weights import check_weights
from deepen_ext.members.loading import Progress, load_members
from deepen_ext.members.member import Member, unique_names
from deepen_ext.ops.checks import check_built_for
from deepen_ext.space.anchors import Anchors
from deepen_ext.space.member_maps import MapSettings, MemberMaps
from deepen_ext.space.recipes import DEFAULT_ENTRIES, DEFAULT_LEARNING_RATE, DEFAULT_RECIPE, RECIPES, Recipe
from deepen_ext.space.relative_map import RelativeMap


class Ensemble:
    """Two or more language models that write one text, fused at every token by DeePEn.

    The first member is the main model: the text is made of its tokens. The others are assistants. Each may
    have a device and a dtype of its own; only its top tokens' ids and probabilities go to the main model's.
    Threads may share an ensemble.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        weights: Sequence[float] | Literal["prompt"] | None = None,
        fuser: str | FuseFunction = "deepen",
        recipe: Recipe = DEFAULT_RECIPE,
        learning_rate: float = DEFAULT_LEARNING_RATE,
        steps: int = 5,
        candidates: int = 128,
        confidence: float = 0.0,
        relative_temperature: float | None = None,
        entries: int = DEFAULT_ENTRIES,
        min_probability: float = 1e-4,
        boundary_aware: bool = True,
        cache: bool = True,
    ) -> None:
        """Find the shared anchors and prepare a relative map for each member.

        Args:
            members: the main model first.
            weights: lambda_i, summing to 1; None for equal ones; "prompt": found for each prompt, from how
                well each member reads it (see `prompt_weights`).
            fuser: "deepen"; for comparison "average", "union-topk", "union-vocab" or "single" (the main model
                alone: one member is enough, and others are not used); or a function of your own (see
                `deepen_ext.fusers`).
            recipe: "bytes", "calibrated" or "paper" (docs/how_it_works.md); of the fuser "deepen".
            learning_rate: eta of the inverse search.
            steps: T of the inverse search.
            candidates: how many of a member's most probable tokens are mapped one by one.
            confidence: how much more a member counts at a token where it is sure: its weight is scaled by
                exp(-confidence H), H the entropy of its distribution in nats; 0 for the weights as they are.
            relative_temperature: of the similarity rows; None for the recipe's own.
            entries: how many of a row's largest entries are kept.
            min_probability: less probable tokens are not worth a row (see `DeepenFuser`).
            boundary_aware: an assistant sits out a step where its last token is likely to be part of a longer
                one (see `BoundaryRule`).
            cache: keep computed rows on disk, and use those of earlier runs.

        With the main model on CUDA all rows are computed here, so that no step ever waits for the device.

        Raises:
            InputError: fewer than two members, fewer than 100 shared anchors, a setting out of range, or a
                member on CUDA with a build that has no CUDA part.
        """
        self._settings: dict[str, Any] = {
            "weights": weights,
            "fuser": fuser,
            "recipe": recipe,
            "learning_rate": learning_rate,
            "steps": steps,
            "candidates": candidates,
            "confidence": confidence,
            "relative_temperature": relative_temperature,
            "entries": entries,
            "min_probability": min_probability,
            "boundary_aware": boundary_aware,
            "cache": cache,
        }
        self._prepare(members, None, **self._settings)

    def variant(self, **settings: Any) -> Ensemble:
        """The same members with some settings changed; relative maps are shared where they stay the same.

        Args:
            settings: what `Ensemble(...)` takes.

        Raises:
            InputError: see `Ensemble`.
        """
        if unknown := settings.keys() - self._settings.keys():
            raise InputError(f"{', '.join(sorted(unknown))}: no setting of an ensemble")
        twin = Ensemble.__new__(Ensemble)
        twin._settings = {**self._settings, **settings}
        twin._prepare(self.members, self._maps, **twin._settings)
        return twin

    def _prepare(
        self,
        members: Sequence[Member],
        maps: MemberMaps | None,
        *,
        weights: Sequence[float] | Literal["prompt"] | None,
        fuser: str | FuseFunction,
        recipe: Recipe,
        relative_temperature: float | None,
        entries: int,
        boundary_aware: bool,
        cache: bool,
        **search: Any,
    ) -> None:
        _check_names(fuser, recipe, weights)
        if fuser == "single" and members:
            members, weights = members[:1], None
        if len(members) < (1 if fuser == "single" else 2):
            raise InputError(f"an ensemble needs two or more members, not {len(members)}")
        for member in members:
            check_built_for(member.device)
        self.device = members[0].device
        self.members = list(members)
        self.names = unique_names(members)
        self.recipe: Recipe = recipe
        even = [1 / len(members)] * len(members)
        self.weighs_prompts = weights == "prompt"
        fixed = even if weights is None or isinstance(weights, str) else weights
        self.weights = check_weights(fixed, len(members))
        self.method = method_name(fuser, recipe)
        self._maps = maps
        if on_relative_maps(fuser):
            rows = MapSettings(
                recipe if fuser == "deepen" else "bytes",
                relative_temperature if fuser == "deepen" else None,
                entries,
                cache,
            )
            if maps is None or not maps.made_with(members, rows):
                self._maps = MemberMaps(members, rows)
        self.fuser: Fuser = make_fuser(
            fuser,
            self.members,
            self._maps if on_relative_maps(fuser) else None,
            self.names,
            recipe=recipe,
            **search,
        )
        alone = len(members) == 1
        self.boundary_rule = BoundaryRule(members[0].vocabulary) if boundary_aware and not alone else None
        self.team = Team(
            tuple(members),
            tuple(self.names),
            self.fuser,
            self.method,
            tuple(self.weights),
            self.weighs_prompts,
            self.boundary_rule,
            self._maps,
        )

    @classmethod
    def from_pretrained(
        cls,
        members: Sequence[str | Path],
        *,
        dtype: str | torch.dtype | Sequence[str | torch.dtype] = "float32",
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        trust_remote_code: bool = False,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Ensemble:
        """Load the members and make an ensemble of them.

        Args:
            members: hub names, local folders or `.gguf` files, the main model first.
            dtype: of the members' weights, "float32", "float16" or "bfloat16"; one for all, or one for each.
            device: where the models go, "cpu", "cuda" or "cuda:1"; one for all, or one for each. The fusion
                runs where the main model is.
            trust_remote_code: run code that members bring along (`load_member`); False refuses them by name.
            progress: called with a line of text as each stage starts.
            settings: everything else `Ensemble(...)` takes: weights, recipe, learning_rate, ...

        Raises:
            InputError: fewer than two members, an unknown path, a setting out of range, or a CUDA
                device that is not there or that this build has no kernels for.
            ModelError: a model cannot be loaded, or its tokenizer fails the byte round trip.
        """
        if len(members) < (1 if settings.get("fuser") == "single" else 2):
            raise InputError(
                f"an ensemble needs two or more members, not {len(members)}; name at least two models"
            )
        weights = settings.get("weights")
        # Before minutes of loading.
        _check_names(settings.get("fuser", "deepen"), settings.get("recipe", DEFAULT_RECIPE), weights)
        if not isinstance(weights, str | None):
            check_weights(weights, len(members))
        loaded = load_members(
            members, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
        if progress is not None:
            progress("Matching vocabularies")
        return cls(loaded, **settings)

    @property
    def maps(self) -> list[RelativeMap]:
        """Each member's relative map; [] where the fuser has none."""
        return [] if self._maps is None else self._maps.maps

    @property
    def anchors(self) -> Anchors:
        """The tokens that the members share.

        Raises:
            InputError: the fuser has no relative space.
        """
        if self._maps is None:
            raise InputError(f"the fuser {self.method} has no relative space, and so no anchors")
        return self._maps.anchors

    @property
    def rows_computed(self) -> int:
        """Relative rows computed since the maps were made, over all members."""
        return sum(one.rows_computed for one in self.maps)

    @overload
    def generate(self, prompt: str | Messages, **settings: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Sequence[str] | Sequence[Messages], **settings: Any) -> BatchGeneration: ...

    def generate(
        self,
        prompt: Prompts,
        *,
        on_text: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> Generation | BatchGeneration:
        """Continue the prompt, or each prompt of a list.

        Args:
            prompt: the text so far; or a chat, a list of messages ``{"role": ..., "content": ...}``, which
                each member reads by its own chat template; or a list of texts or of chats, written side by
                side, `batch_size` at a time. A row gets the tokens it gets alone (greedy, float32).
            on_text: called with each new piece of text, whole characters only; for one prompt.
            settings: those of `start`: max_new_tokens, do_sample, temperature, certified_skip, trace, ...

        Returns:
            A `Generation` for one prompt; a `BatchGeneration` (with ``.texts``) for a list.

        Raises:
            InputError: an empty prompt, a setting out of range or unknown, a prompt that with its new tokens
                exceeds some member's context, a batch that exceeds the memory; a member that gives NaN.
            ModelError: a member's forward pass failed. Its name is in the message; the next call works.
        """
        batch = is_batch(prompt)
        if batch and on_text is not None:
            raise InputError("on_text takes one prompt; give the prompts one at a time, or leave it out")
        run = self.start(prompt, **settings)
        try:
            for written in run:
                if on_text is not None and written[0].text:
                    on_text(written[0].text)
        finally:
            run.close()
        generations = run.results()
        return BatchGeneration(generations, run.timings) if batch else generations[0]

    def stream(self, prompt: str | Messages, **settings: Any) -> TextStream:
        """Continue one prompt; iterate what this returns for pieces of text, whole characters only.

        Nothing is computed before the first piece is asked for. Closing it, leaving its ``with`` block or
        dropping it ends the work and frees the caches; ``.result`` is the `Generation` so far. Arguments and
        errors are those of `generate`.
        """
        if is_batch(prompt):
            raise InputError("a stream takes one prompt; stream the prompts one at a time")
        return TextStream(self.start(prompt, **settings))

    def start(
        self,
        prompt: Prompts,
        *,
        generation_config: GenerationConfig | None = None,
        certified_skip: bool = False,
        confidence_gate: float | None = None,
        streamer: Any = None,
        trace: str | Path | Callable[[dict[str, Any]], object] | None = None,
        shared: SharedForwards | None = None,
        batch_size: int | None = None,
        without_template: Literal["error", "plain"] = "error",
        **decoding: Any,
    ) -> Run:
        """A generation that is ready to go, step by step: what `generate` and `stream` run.

        Args:
            prompt: see `generate`.
            generation_config: transformers' settings; those set in it count, keywords come before them.
            certified_skip: greedy only: do not ask the assistants where they cannot change the token.
                The text is the same with and without; `timings.settled` counts the tokens. (A stopping
                criterion that looks at scores sees the main model's own there.)
            confidence_gate: not exact: do not ask them either where the main model's first choice has at
                least this probability.
            streamer: one of transformers' streamers, for one prompt.
            trace: a file for one JSON line a token, or a function that gets each record (see `Trace`).
            shared: what members gave for the same prompts in other runs, and what this one adds to it (see
                `SharedForwards`).
            batch_size: of a list of prompts, how many are written at once (None: all); where a text ends, the
                next prompt begins.
            without_template: in a chat, what to do for a member that has no chat template: "error", or
                "plain" for a plain transcript.
            decoding: transformers' own names, for the fused distribution: max_new_tokens (128), do_sample,
                temperature, top_k, top_p, repetition_penalty, min_new_tokens, stop_strings, eos_token_id,
                logits_processor, stopping_criteria, ... and ``seed``. One that is not supported is refused.

        Raises:
            InputError: see `generate`.
        """
        try:
            settings = Settings.read(self.members[0], generation_config, **decoding)
            prompts = read_prompts(self.members, prompt, without_template)
            return Run(
                self.team,
                prompts,
                settings,
                certified_skip=certified_skip,
                confidence_gate=confidence_gate,
                trace=trace,
                streamer=streamer,
                shared=shared,
                batch_size=batch_size,
            )
        except BaseException:
            if streamer is not None:
                streamer.end()  # whoever reads from it must not wait for ever
            raise

    @property
    def custom_generate(self) -> Callable[..., Any]:
        """The ensemble's loop for the main model's ``generate(..., custom_generate=...)`` (see `adapters`).

        It takes what `generate` takes of transformers' settings, ``streamer`` included, and of ours ``seed``,
        ``certified_skip``, ``confidence_gate``, ``trace``, ``messages`` and ``without_template``.
        """
        from deepen_ext.adapters import custom_generate

        return custom_generate(self)

    def save_rows(self) -> None:
        """Write newly computed relative rows to the cache folder, for the next run."""
        if self._maps is not None:
            self._maps.save()


def _check_names(fuser: object, recipe: object, weights: object) -> None:
    if recipe not in RECIPES:
        raise InputError(f"recipe is '{recipe}'; use one of {', '.join(RECIPES)}")
    if isinstance(fuser, str) and fuser not in FUSERS:
        raise InputError(f"fuser is '{fuser}'; use one of {', '.join(FUSERS)}, or a function")
    if isinstance(weights, str) and weights != "prompt":
        raise InputError(f"weights are '{weights}'; give a list of numbers, or 'prompt'")
