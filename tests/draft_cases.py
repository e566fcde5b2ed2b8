"""Generations at random, to be written with and without drafts: what is asked for, and what came of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sessions import changed
from tiny_models import AWKWARD, PROSE

from deepen_ext import Ensemble
from deepen_ext.decoding.generation import Generation, Timings
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.fusers.parts import Said
from deepen_ext.members.member import Member
from deepen_ext.members.top_k_only import TopKOnly

# None begins with another one: a call of a processor tells by its ids which text it is about.
PROMPTS = [
    "The capital of France is",
    "Once",
    PROSE[:300],
    AWKWARD[:40],
    "日本の",
    "🙂🙃 and 🦙",
    "Antarctica's straw",
    "Ein Satz über Zürich, und e\u0301",
    "def quicksort(values):\n    if len(",
    "Привет, как дела? Сегодня",
    PROSE[1300:1360] + " Again: " + PROSE[1300:1330],
]
FORCED = ["🙂🙃🫠🦙", "日本の首都は東京です。", "e\u0301a\u0300o\u0302 n\u0303 ก็", "👩\u200d👩\u200d👧 €1"]
TEAMS = [
    ("smollm2", "gemma"),
    ("gemma", "smollm2"),
    ("smollm2", "qwen"),
    ("qwen", "smollm2"),
    ("gemma", "qwen"),
    ("qwen", "gemma"),
    ("smollm2", "gemma", "qwen"),
    ("qwen", "smollm2", "gemma"),
]
# Sums of float32 are rounded in another order where several tokens are read at once. The search's first step
# goes as far for a gradient of 1e-6 as for 1: it makes more of such a difference.
CLOSE, CLOSE_FUSED = 1e-4, 0.02
VISIBLE = 40  # tokens of a member of which only the most probable ones are seen


def one_of_three(logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
    """A caller's fuser: the assistants' first choices pick among the main model's first three."""
    pick = torch.zeros(len(logits), dtype=torch.long)
    for one in said[1:]:
        pick += one.topk.ids[:, 0].long()
    chosen = logits.topk(3).indices.gather(1, (pick % 3)[:, None])
    return logits.scatter_add_(1, chosen, torch.full(chosen.shape, 40.0))


# How the assistants are made to overrule the main model at about every second token. Their number has no
# factor in common with that of the teams, so that each meets every team. "behind": an assistant leads.
FUSIONS: list[dict[str, Any]] = [
    {"fuser": "deepen", "learning_rate": 1.0},
    {"fuser": "deepen", "learning_rate": 1.0, "confidence": 1.0},
    {"fuser": "deepen", "learning_rate": 0.3},
    {"fuser": "deepen", "learning_rate": 1.0, "weights": "prompt"},
    {"fuser": "deepen", "learning_rate": 1.0, "boundary_aware": False},
    {"fuser": "average"},
    {"fuser": "average", "weights": "prompt", "confidence": 1.0},
    {"fuser": "union-topk"},
    {"fuser": "union-vocab"},
    {"fuser": "union-vocab", "weighing": "disagreement"},
    {"fuser": "follow", "learning_rate": 1.0, "weights": "prompt"},
    {"fuser": "follow", "weights": "behind"},
    {"fuser": "follow", "learning_rate": 1.0, "weights": "size"},
    {"fuser": "product"},
    {"fuser": "consistent", "weighing": "consistency"},
    {"fuser": one_of_three},
    {"fuser": "single"},
]


class Watcher:
    """A processor and a stopping criterion of the caller's, which count: they keep the ids they saw."""

    def __init__(self, *, thirds: bool, stops: bool) -> None:
        self.thirds = thirds
        self.stops = stops
        self.processed: list[list[int]] = []
        self.judged: list[list[int]] = []
        self.highest: dict[tuple[str, tuple[int, ...]], float] = {}

    def process(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Bans every third token, others at each place: many of the drafted ones. It counts its calls."""
        ids = ids[0].tolist()
        self.highest["processor", tuple(ids)] = float(scores.max())
        if self.thirds:
            calls = sum(before[:1] == ids[:1] and ids[: len(before)] == before for before in self.processed)
            scores[:, calls % 3 :: 3] = -torch.inf
        self.processed.append(ids)
        return scores

    def judge(self, ids: torch.Tensor, scores: tuple[torch.Tensor]) -> torch.Tensor:
        """Ends the text at one token in 16."""
        self.judged.append(ids[0].tolist())
        self.highest["criterion", tuple(ids[0].tolist())] = float(scores[0].max())
        return torch.tensor([self.stops and int(ids[0, -1]) % 16 == 3])


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, ids: torch.Tensor) -> None:
        self.given.append(ids.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@dataclass
class Outcome:
    """What a generation gave."""

    texts: list[Generation]
    timings: Timings
    cycles: int  # drafts of one text that were verified
    records: list[dict[str, Any]]
    watcher: Watcher
    streamed: list[list[int]] | None
    pieces: list[str]


@dataclass
class Case:
    """One thing to ask for, with everything that may not depend on drafts."""

    members: Sequence[Member]
    names: tuple[str, ...]
    fusion: Mapping[str, Any]
    prompts: list[str]
    settings: dict[str, Any]
    batch_size: int | None = None
    watched: bool = False
    thirds: bool = False
    stops: bool = False
    forced: str | None = None  # by prefix_allowed_tokens_fn, tokens that are parts of characters among them
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        own = {name: value for name, value in vars(self).items() if name != "members"}
        return f"{own}, contexts {[one.context_length for one in self.members]}"

    def allowed(self) -> Any:
        """A `prefix_allowed_tokens_fn`: the forced text, then any of 300 tokens."""
        vocabulary = self.members[0].vocabulary
        assert self.forced is not None
        forced, begun = vocabulary.encode(self.forced), {}

        def allow(text: int, ids: torch.Tensor) -> list[int]:
            at = len(ids) - begun.setdefault(text, len(ids))
            return [forced[at]] if at < len(forced) else list(range(300, 600))

        return allow

    def write(self, ensemble: Ensemble, shared: SharedForwards | None = None, **draft: Any) -> Outcome:
        """The texts, with drafts as asked for."""
        watcher = Watcher(thirds=self.thirds, stops=self.stops)
        records: list[dict[str, Any]] = []
        settings = {**self.settings, **self.more, **draft, "shared": shared}
        if self.watched:
            settings |= {"logits_processor": [watcher.process], "stopping_criteria": [watcher.judge]}
        if self.forced is not None:
            settings["prefix_allowed_tokens_fn"] = self.allowed()
        streamer = Streamer() if len(self.prompts) == 1 else None
        run = ensemble.start(
            self.prompts, batch_size=self.batch_size, trace=records.append, streamer=streamer, **settings
        )
        pieces, cycles, steps = [], 0, 0
        for written in run:
            if run.timings.steps > steps:
                cycles, steps = cycles + len({one.number for one in written}), run.timings.steps
            pieces.extend(one.text for one in written if one.number == 0)
        run.close()
        records.sort(key=lambda one: (one["row"], one["position"]))
        given = None if streamer is None else streamer.given
        return Outcome(run.results(), run.timings, cycles, records, watcher, given, pieces)


class Cases:
    """Draws cases; an ensemble is made once."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self.members = members
        self._ensembles: dict[Any, Ensemble] = {}

    def draw(self, rng: random.Random, number: int) -> Case:
        """One case, of at most 20 tokens a text; teams and fusions take turns."""
        names, fusion = TEAMS[number % len(TEAMS)], FUSIONS[number % len(FUSIONS)]
        members = [self.members[name] for name in names]
        prompts = rng.sample(PROMPTS, rng.choice([1, 2, 3, 4, 5]))
        settings: dict[str, Any] = {"max_new_tokens": rng.choice([2, 7, 13, 20])}
        case = Case(members, names, fusion, prompts, settings)
        if len(prompts) > 1 and rng.random() < 0.3:
            case.batch_size = rng.randrange(1, len(prompts))
        if rng.random() < 0.4:
            settings |= {
                "do_sample": True,
                "seed": rng.randrange(99),
                "temperature": rng.choice([0.7, 1, 1.5]),
            }
            if rng.random() < 0.3 and fusion["fuser"] != "average":
                # "average" gives all tokens that no member names about the same probability. Where the
                # nucleus ends among them, rounding decides which tokens are in it.
                settings["top_p"] = rng.choice([0.5, 0.9])
            elif rng.random() < 0.3:
                settings["top_k"] = 30
        if rng.random() < 0.2:
            self._hide(rng, case)
        elif rng.random() < 0.2:
            settings["repetition_penalty"] = rng.choice([0.8, 1.3])
        if rng.random() < 0.2:
            settings["no_repeat_ngram_size"] = 2
        if rng.random() < 0.2:
            settings["min_new_tokens"] = 3
        if rng.random() < 0.5 and fusion["fuser"] == "deepen" and not settings.get("do_sample"):
            case.more["certified_skip"] = True
            case.fusion = FUSIONS[0] | {"learning_rate": 0.1}
        if number % 6 == 5:
            case.more["confidence_gate"] = rng.choice([0.5, 0.9])
        hidden = isinstance(case.members[0].backend, TopKOnly)
        if not hidden and rng.random() < 0.25:
            case.watched = True
            case.thirds, case.stops = rng.random() < 0.4, rng.random() < 0.4
        elif not hidden and rng.random() < 0.2:
            self._force(rng, case)
        if number % 3 == 1:
            self._narrow(case)
        return case

    def ensemble(self, case: Case) -> Ensemble:
        """Of the case's members."""
        fusion = {
            name: value
            for name, value in case.fusion.items()
            if case.fusion["fuser"] != "single" or name == "fuser"
        }
        members = case.members[:1] if case.fusion["fuser"] == "single" else case.members
        if fusion.get("weights") == "behind":
            fusion["weights"] = (0.2, 0.8) if len(members) == 2 else (0.2, 0.35, 0.45)
        key = (*map(id, members), *fusion.items())
        if key in self._ensembles:
            return self._ensembles[key]
        made = next((one for k, one in self._ensembles.items() if one.members == list(members)), None)
        made = Ensemble(members, **fusion) if made is None else made.variant(**{"fuser": "deepen", **fusion})
        if all(any(one is own for own in self.members.values()) for one in members):
            self._ensembles[key] = made  # members made for a case do not come back
        return made

    def end_somewhere(self, rng: random.Random, case: Case, texts: Sequence[Generation]) -> None:
        """Ends, and bans, in the middle of what would be written."""
        one = rng.choice(texts)
        kind = rng.choice(["eos", "stop", "ban", "none"])
        if kind == "eos":
            ids = rng.sample(one.token_ids, min(len(one.token_ids), 2))
            case.settings["eos_token_id"] = [*ids, *case.members[0].eos_ids]
        elif kind == "stop" and one.text:
            start = rng.randrange(len(one.text))
            case.settings["stop_strings"] = [one.text[start : start + rng.choice([1, 2, 3, 6])], "東京"]
        elif kind == "ban":
            banned = set(rng.sample(one.token_ids, min(len(one.token_ids), 3))) - set(case.members[0].eos_ids)
            if banned:
                case.settings["bad_words_ids"] = [[token] for token in banned]

    def _hide(self, rng: random.Random, case: Case) -> None:
        """Some members as a server would have them."""
        if case.fusion["fuser"] not in ("deepen", "average") or case.fusion.get("weights") == "prompt":
            return
        seen = [rng.random() < 0.4 for _ in case.members]
        seen[0] |= case.fusion["fuser"] == "average"  # which needs the main model's logits
        case.members = [
            one if whole else replace(one, backend=TopKOnly(one.backend, VISIBLE))
            for one, whole in zip(case.members, seen, strict=True)
        ]
        if case.settings.get("do_sample") and isinstance(case.members[0].backend, TopKOnly):
            case.settings["top_k"] = 20

    def _narrow(self, case: Case) -> None:
        """Contexts that hold prompts and as many new tokens, and nothing more.

        An assistant's fills up where it needs more tokens for the text than the main model.
        """
        if case.forced is None and not isinstance(case.members[0].backend, TopKOnly):
            _bias_to(case, FORCED[1])
        more = case.settings["max_new_tokens"]
        narrow = []
        for one in case.members:
            own = one.vocabulary
            longest = max(len(own.prefix_ids) + len(own.encode(prompt)) for prompt in case.prompts)
            hidden = isinstance(one.backend, TopKOnly)
            narrow.append(one if hidden else changed(one, context_length=longest + more))
        case.members = narrow

    def _force(self, rng: random.Random, case: Case) -> None:
        """A continuation that no model would write: by a function, or by biases, which drafts see too."""
        text = rng.choice(FORCED)
        if rng.random() < 0.3:
            case.forced = text
            return
        _bias_to(case, text)


def _bias_to(case: Case, text: str) -> None:
    """Biases that make the main model go on with this text, once it has begun."""
    ids = case.members[0].vocabulary.encode(text)
    chain = {tuple(ids[max(0, i - 3) : i + 1]): 25.0 for i in range(1, len(ids))}
    case.settings["sequence_bias"] = {(ids[0],): 6.0} | chain


def drafts_of(rng: random.Random, case: Case, ensemble: Ensemble) -> dict[str, Any]:
    """`draft` and `drafter`."""
    others = [] if case.fusion["fuser"] == "single" else ensemble.names[1:]
    drafter = rng.choice(["auto", "main", "main", "lookup", *others, *others])
    return {"draft": rng.choice([1, 3, 3, 8, 8, "auto"]), "drafter": drafter}


def differences(want: Outcome, got: Outcome, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
    """What is not the same, in words.

    Args:
        want: without drafts.
        got: with them.
        prompts: of each text, in the main model's tokens.
    """
    for number, (one, other) in enumerate(zip(want.texts, got.texts, strict=True)):
        for name in ("token_ids", "text", "finish_reason", "changed_tokens"):
            if getattr(one, name) != getattr(other, name):
                yield f"text {number}, {name}: {getattr(one, name)!r}, with drafts {getattr(other, name)!r}"
    for name in ("tokens", "settled", "gated"):
        if getattr(want.timings, name) != getattr(got.timings, name):
            yield f"{name}: {getattr(want.timings, name)}, with drafts {getattr(got.timings, name)}"
    for name in ("processed", "judged"):
        if _by_text(getattr(want.watcher, name), prompts) != _by_text(getattr(got.watcher, name), prompts):
            yield f"{name}: other calls"
    for call, highest in got.watcher.highest.items():
        before = want.watcher.highest.get(call, highest)
        if not math.isclose(before, highest, abs_tol=0.1):
            yield f"the scores of {call}: {before}, with drafts {highest}"
    if [one for one in want.pieces if one] != [one for one in got.pieces if one]:
        yield f"pieces: {want.pieces}, with drafts {got.pieces}"
    if want.streamed != got.streamed:
        yield f"streamed: {want.streamed}, with drafts {got.streamed}"
    if len(want.records) != len(got.records):
        yield "trace: other records"
    for one, other in zip(want.records, got.records, strict=False):
        yield from _unlike(one, other)
    yield from _fates(got)


def _by_text(calls: Sequence[list[int]], prompts: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """The calls about each text, in order."""
    return [[ids for ids in calls if ids[: len(prompt)] == list(prompt)] for prompt in prompts]


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """What two records do not say alike, but for who wrote the token and how long it took."""
    where = f"trace of text {one['row']}, token {one['position']}"
    for name in ("row", "position", "token", "main_choice", "not_asked"):
        if one[name] != other[name]:
            yield f"{where}: {name} {one[name]}, with drafts {other[name]}"
    if [own["name"] for own in one["members"]] != [own["name"] for own in other["members"]]:
        yield f"{where}: other members"
        return
    for own, others in zip([*one["members"], one], [*other["members"], other], strict=True):
        if not math.isclose(own.get("weight", 0), others.get("weight", 0), abs_tol=CLOSE):
            yield f"{where}: weight {own['weight']}, with drafts {others['weight']}"
        top, theirs = own.get("top", own.get("fused")), others.get("top", others.get("fused"))
        probabilities = [[each["probability"] for each in candidates] for candidates in (top, theirs)]
        close = CLOSE_FUSED if own is one else CLOSE
        if not all(math.isclose(a, b, abs_tol=close) for a, b in zip(*probabilities, strict=True)):
            yield f"{where}: {own.get('name', 'fused')}: {top}, with drafts {theirs}"


def _fates(got: Outcome) -> Iterator[str]:
    """Whether the trace's `draft` goes with the counts."""
    fates = [one["draft"] for one in got.records]
    settled = sum(one["not_asked"] == "settled" for one in got.records)
    if fates.count("settled") != settled:
        yield f"trace: {fates.count('settled')} are 'settled', and {settled} were"
    if not fates.count("stood") <= got.timings.stood <= fates.count("stood") + settled:
        yield f"trace: {fates.count('stood')} stood, and in timings {got.timings.stood}"
    if got.timings.stood > got.timings.drafted:
        yield f"{got.timings.stood} stood of {got.timings.drafted}"
