"""What a generation gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal[
    "eos", "length", "stop_string", "stopping_criteria", "context", "cancelled", "member_lost"
]


@dataclass
class Timings:
    """Where the time of one generation went, in milliseconds of wall clock.

    `steps` steps made `tokens` tokens: of each text still being written one, or with drafts one or more. The
    first step reads the prompts and gives each text one token: its share is in `prompt_ms` (the time to the
    first token) and in nothing else; prompts that wait for a lane (`batch_size`) are read in later steps,
    among the tokens of others. On CUDA work is only queued until the tokens are read: what members and fusion
    take there shows in `sampling_ms`.
    """

    steps: int = 0
    tokens: int = 0
    drafted: int = 0  # tokens that were written ahead, to be verified later
    stood: int = 0  # of these, those that were kept
    settled: int = 0  # tokens that no assistant could have changed (the certified skip), so none was asked
    gated: int = 0  # tokens for which the main model was sure enough (`confidence_gate`)
    prompt_ms: float = 0.0
    members_ms: dict[str, float] = field(default_factory=dict)  # forward passes, by member
    fusion_ms: float = 0.0  # top-k, certificate, relative rows, search
    handoff_ms: float = 0.0  # bytes, re-tokenisation
    sampling_ms: float = 0.0
    total_ms: float = 0.0
    step_ms: list[float] = field(default_factory=list)  # of every step, the first included
    step_texts: list[int] = field(default_factory=list)  # how many texts were being written in it
    rows: int = 1  # texts of the first step

    def add_step(
        self,
        members_ms: Mapping[str, float],
        stages: Mapping[str, float],
        reasons: Sequence[str | None],
        *,
        texts: int,
        drafted: int,
        stood: int,
    ) -> None:
        """Count a step.

        Args:
            members_ms: milliseconds by member.
            stages: milliseconds by stage.
            reasons: of each token that was written, why no assistant was asked, or None.
            texts: how many texts they are of.
            drafted: how many tokens were written ahead.
            stood: how many of those were kept.
        """
        for name, spent in members_ms.items():
            self.members_ms[name] += spent
        self.fusion_ms += stages["fusion"]
        self.sampling_ms += stages["sampling"]
        self.handoff_ms += stages["handoff"]
        self.steps += 1
        self.tokens += len(reasons)
        self.step_texts.append(texts)
        self.drafted += drafted
        self.stood += stood
        self.settled += list(reasons).count("settled")
        self.gated += list(reasons).count("gated")

    def end_of_prompt(self) -> None:
        """Put the first step's time under the prompt, so that the rest are times a token."""
        self.prompt_ms = self.total_ms
        self.members_ms = dict.fromkeys(self.members_ms, 0.0)
        self.fusion_ms = self.handoff_ms = self.sampling_ms = 0.0

    @property
    def later_tokens(self) -> float:
        """Tokens of a text after the first step: all of them by the texts there were, averaged over time.

        What times a token of a text divide by."""
        later = list(zip(self.step_ms, self.step_texts, strict=False))[1:]
        spent = sum(ms for ms, _ in later)
        texts = sum(ms * count for ms, count in later) / spent if spent else 1.0
        return max((self.tokens - self.rows) / texts, 1.0)

    @property
    def ms_per_token(self) -> float:
        """Total without the prompt's step: milliseconds a token of each text."""
        return (self.total_ms - self.prompt_ms) / self.later_tokens

    @property
    def fusion_ms_per_token(self) -> float:
        """Fusion without the prompt's step."""
        return self.fusion_ms / self.later_tokens

    @property
    def acceptance(self) -> float:
        """Share of the tokens written ahead that were kept; 0 where there were none."""
        return self.stood / max(self.drafted, 1)

    @property
    def tokens_per_second(self) -> float:
        """Over all texts, without the prompt's step."""
        seconds = (self.total_ms - self.prompt_ms) / 1e3
        return (self.tokens - self.rows) / seconds if seconds > 0 else 0.0

    @property
    def skipped_share(self) -> float:
        """Share of the tokens for which the assistants were not asked, as settled or gated."""
        return (self.settled + self.gated) / max(self.tokens, 1)


@dataclass(frozen=True)
class Generation:
    """A text that the ensemble wrote.

    Attributes:
        text: the new text, without the prompt and special tokens. A stop string that ended it is kept, as
            transformers keeps it.
        token_ids: the main model's new tokens, a final EOS included.
        finish_reason: "eos", "length" (max_new_tokens reached), "stop_string", "stopping_criteria",
            "context": some member's context is full (an assistant may need more tokens for the text than the
            main model), "member_lost": the text is what a `MemberLost` error has of it, or "cancelled": it
            has no end, as of a stream that was closed before, or that is not read to the end yet.
        changed_tokens: how many tokens differ from the most probable one of the main model alone.
        timings: where the time went; of the whole batch where there was one.
        backends: what computed each member, the main model first, such as "transformers 5.23.0".
        lost: the members that were lost on the way (`on_failure="continue"`), by name: the position, among
            the new tokens, of the first that was written without it.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    changed_tokens: int
    timings: Timings
    backends: list[str]
    lost: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchGeneration:
    """The texts of a list of prompts, in its order; `batch[b]` is text b's `Generation`."""

    generations: list[Generation]
    timings: Timings

    @property
    def texts(self) -> list[str]:
        """The new texts."""
        return [one.text for one in self.generations]

    @property
    def backends(self) -> list[str]:
        """What computed each member: see `Generation`."""
        return self.generations[0].backends

    def __len__(self) -> int:
        return len(self.generations)

    def __getitem__(self, number: int) -> Generation:
        return self.generations[number]

    def __iter__(self) -> Iterator[Generation]:
        return iter(self.generations)
