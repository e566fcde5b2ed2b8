"""The ensemble: members, their anchors and relative maps, and the ways to make them write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from transformers import GenerationConfig

from deepen_ext.decoding.boundary import BoundaryRule
from deepen_ext.decoding.drafts.draft_settings import DraftSettings
from deepen_ext.decoding.generation import BatchGeneration, Generation
from deepen_ext.decoding.loop import Run
from deepen_ext.decoding.make_team import main_first, make_team, team_weights
from deepen_ext.decoding.prompts import Messages, Prompts, is_batch, read_prompts
from deepen_ext.decoding.setting_rules import check_callable
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.decoding.stream import TextStream
from deepen_ext.errors import InputError, shown
from deepen_ext.fusers import Fuser, FusionSettings
from deepen_ext.fusers.weights import WeightsRule
from deepen_ext.members.load_options import LOAD_OPTIONS
from deepen_ext.members.loading import Progress, check_names, load_members
from deepen_ext.members.member import Member
from deepen_ext.space.anchors import Anchors
from deepen_ext.space.member_maps import MemberMaps
from deepen_ext.space.recipes import Recipe
from deepen_ext.space.relative_map import RelativeMap


class Ensemble:
    """Two or more language models that write one text, fused at every token by DeePEn.

    The first member is the main model: the text is made of its tokens. The others are assistants. Each may
    have a device and a dtype of its own; only its top tokens' ids and probabilities go to the main model's.
    Threads may share an ensemble.
    """

    def __init__(self, members: Sequence[Member], **settings: Any) -> None:
        """Find the shared anchors and prepare a relative map for each member.

        With the main model on CUDA all rows are computed here, so that no step ever waits for the device.

        Args:
            members: the main model first.
            settings: those of `deepen_ext.fusers.FusionSettings`, which documents them all with their
                defaults and ranges. The common ones: weights (one for each member, "size" or "prompt"), fuser
                ("deepen", "average", ..., or a function), recipe, learning_rate, confidence.

        Raises:
            InputError: fewer than two members, fewer than 100 shared anchors, an unknown setting or one out
                of range, or a member on CUDA with a build that has no CUDA part.
        """
        self._settings = FusionSettings().changed(**settings)
        self.team = make_team(members, self._settings)

    def variant(self, **settings: Any) -> Ensemble:
        """The same members with some settings changed; relative maps are shared where they stay the same.

        The order of the members stays that of `names`, and weights go by it. Settings and errors are those of
        `Ensemble(...)`.
        """
        twin = Ensemble.__new__(Ensemble)
        twin._settings = self._settings.changed(**settings)
        twin.team = make_team(self.team.members, twin._settings, self.team.maps)
        return twin

    @classmethod
    def from_pretrained(
        cls,
        members: Sequence[str | Path],
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Ensemble:
        """Load the members and make an ensemble of them.

        Args:
            members: hub names, local folders, `.gguf` files or embedded models; with a PEFT adapter on it,
                ``"base@adapter"``. The main model first. But where neither weights nor a fuser (other than
                "auto") are given, all members give logits and their sizes are known, a member with at least
                twice the first one's weights outside of the embeddings takes its place (the largest of them).
            progress: called with a line of text as each stage starts.
            options: what `Ensemble(...)` takes (weights, recipe, learning_rate, ...); and how the members are
                loaded (`deepen_ext.members.load_options.LoadOptions` documents it: backend, device, dtype,
                ...), each of these one value for all, or a list of one for each. The fusion runs where the
                main model is.

        Raises:
            InputError: fewer than two members, an unknown path, a setting out of range, or a CUDA
                device that is not there or that this build has no kernels for.
            ModelError: a model cannot be loaded, or its tokenizer fails the byte round trip.
        """
        loading = {key: options.pop(key) for key in LOAD_OPTIONS if key in options}
        options = check_ensemble(members, options)
        loaded = load_members(members, progress=progress, **loading)
        if progress is not None:
            progress("Matching vocabularies")
        return cls(main_first(loaded, options), **options)

    @property
    def members(self) -> list[Member]:
        """The main model first."""
        return list(self.team.members)

    @property
    def names(self) -> list[str]:
        """The members', no two alike."""
        return list(self.team.names)

    @property
    def backends(self) -> list[str]:
        """What computes each member, the main model first, such as "transformers 5.23.0"."""
        return list(self.team.backends)

    @property
    def weights(self) -> list[float]:
        """lambda_i, summing to 1; where a rule finds them for each prompt, those it starts from."""
        return list(self.team.weights)

    @property
    def weights_or_rule(self) -> list[float] | WeightsRule:
        """The weights, or the name of the rule that finds them for each prompt."""
        return self.team.weights_rule or self.weights

    @property
    def weighs_prompts(self) -> bool:
        """Whether the weights are found for each prompt."""
        return self.team.weighs_prompts

    @property
    def device(self) -> torch.device:
        """Where the fusion runs: the main model's."""
        return self.team.device

    @property
    def fuser(self) -> Fuser:
        """Makes new logits of what the members say."""
        return self.team.fuser

    @property
    def method(self) -> str:
        """What tables and records call the fuser: "deepen:bytes", "average", or a function's name."""
        return self.team.method

    @property
    def recipe(self) -> Recipe:
        """How tokens are placed in the relative space, where the fuser has recipes."""
        return self._settings.recipe

    @property
    def boundary_rule(self) -> BoundaryRule | None:
        """When an assistant sits out a step; None for never."""
        return self.team.boundary_rule

    @property
    def maps(self) -> list[RelativeMap]:
        """Each member's relative map; [] where the fuser has none."""
        return [] if self._maps is None else list(self._maps.maps)

    @property
    def anchors(self) -> Anchors:
        """The tokens that the members share; InputError where the fuser has no relative space."""
        if self._maps is None:
            raise InputError(f"the fuser {self.method} has no relative space, and so no anchors")
        return self._maps.anchors

    @property
    def _maps(self) -> MemberMaps | None:
        return self.team.maps if self.fuser.uses_maps else None  # a team may keep them for a variant

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
            settings: those of `start`: max_new_tokens, do_sample, temperature, draft, certified_skip, ...

        Returns:
            A `Generation` for one prompt; a `BatchGeneration` (with ``.texts``) for a list.

        Raises:
            InputError: an empty prompt, a setting out of range or unknown, a prompt that with its new tokens
                exceeds some member's context, a batch that exceeds the memory; a member that gives NaN.
            ModelError: a member's forward pass failed, or it was lost (`MemberLost`, which has what was
                written; see the setting `on_failure`). Its name is in the message; the next call works.
        """
        batch = is_batch(prompt)
        check_callable("on_text", on_text)
        if batch and on_text is not None:
            raise InputError("on_text takes one prompt; give the prompts one at a time, or leave it out")
        run = self.start(prompt, **settings)
        try:
            for written in run:
                if on_text is not None and (piece := "".join(one.text for one in written)):
                    on_text(piece)
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
        draft: Literal["auto"] | int | None = None,
        drafter: str = "auto",
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
            certified_skip: greedy only: do not ask the assistants where they cannot change the token. The
                text is the same; `timings.settled` counts the tokens. (A stopping criterion that looks at
                scores sees the main model's own there.)
            confidence_gate: not exact: nor where the main model's first choice has at least this probability.
            draft: how many tokens are written ahead and verified at once: "auto" for as many as pay, by
                measured times; 0 for none. The text is the same. None: "auto" where all members are
                `repeatable`; else 0, because among their near-ties another token could win.
            drafter: who writes ahead: "main", a member's name, "lookup" (what followed the last tokens
                earlier in the text), or "auto" (with a number for `draft` the main model).
            streamer: one of transformers' streamers, for one prompt.
            trace: a file for one JSON line a token, or a function that gets each record (see `Trace`).
            shared: forwards to share with other runs over the same prompts (see `SharedForwards`).
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
        check_callable("streamer", streamer, "put", "end")
        try:
            if shared is not None and not isinstance(shared, SharedForwards):
                raise InputError(f"shared is {shown(shared)}; give a SharedForwards")
            settings = Settings.read(self.members[0], generation_config, **decoding)
            drafts = DraftSettings.read(self.team, draft, drafter)
            prompts = read_prompts(self.members, prompt, without_template)
            return Run(
                self.team,
                prompts,
                settings,
                certified_skip=certified_skip,
                confidence_gate=confidence_gate,
                drafts=drafts,
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
        ``draft``, ``drafter``, ``certified_skip``, ``confidence_gate``, ``trace``, ``messages`` and
        ``without_template``.
        """
        from deepen_ext.adapters import custom_generate

        return custom_generate(self)

    def save_rows(self) -> None:
        """Write newly computed relative rows to the cache folder, for the next run."""
        self.team.save_rows()


def check_ensemble(members: Sequence[str | Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """What is wrong with an ensemble that is to be loaded, before minutes of loading.

    Args:
        members: see `Ensemble.from_pretrained`.
        options: what `Ensemble` takes beside them.

    Returns:
        the options as an ensemble keeps them: weights that can be read once are a tuple now.

    Raises:
        InputError: the number of members, of weights, or a setting out of range.
    """
    settings = FusionSettings().changed(**options)
    team_weights(settings, len(check_names(members)), "; name at least two models")
    return {name: getattr(settings, name) for name in options}
