"""Those who answer items: some ensembles by name, in this process or in replicas of Ray."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Protocol

from deepen_ext.cluster.pool import Pool
from deepen_ext.decoding.generation import BatchGeneration
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError, shown
from deepen_ext.measure.evaluation.choice_scores import score_choices
from deepen_ext.measure.evaluation.choices import ChoiceItem, ChoiceTask
from deepen_ext.measure.evaluation.headers import Header, configuration_header
from deepen_ext.measure.evaluation.jobs import Job
from deepen_ext.measure.evaluation.limits import check_contexts, check_fuser, check_memory
from deepen_ext.measure.evaluation.records import ItemRecord, ItemTiming, Record
from deepen_ext.measure.evaluation.tasks import Item, Task
from deepen_ext.measure.evaluation.votes import Poll, Votes, counted
from deepen_ext.members.member import Member

Records = Mapping[str, Sequence[Record]]  # by the name of the configuration
Ensembles = Mapping[str, Ensemble | Poll]


@dataclass(frozen=True)
class Way:
    """How answers are found, in all batches of an evaluation; see `evaluate`."""

    batch_size: int
    certified_skip: bool
    share_forwards: bool
    votes: Votes | None


@dataclass(frozen=True)
class Batch:
    """Items that are answered together, and the names of the configurations that do."""

    task: Task
    items: Sequence[Item]
    names: Sequence[str]


class Writers(Protocol):
    """What `evaluate` needs of those who answer."""

    def names(self) -> list[str]:
        """The configurations that write or score."""
        ...

    def polls(self) -> dict[str, Poll]:
        """Those that vote on what others wrote."""
        ...

    def headers(self) -> dict[str, Header]:
        """Of each that writes or scores, its part of a file's header."""
        ...

    def check_fusers(self, job: Job) -> None:
        """See `limits.check_fuser`."""
        ...

    def check_contexts(self, job: Job) -> None:
        """See `limits.check_contexts`."""
        ...

    def check_memory(self, job: Job) -> None:
        """See `limits.check_memory`."""
        ...

    def answer(self, batches: Iterable[Batch]) -> Generator[Records, None, None]:
        """The records of the batches, some at a time. Closing it frees what it holds."""
        ...


class WritersHere:
    """Ensembles in this process."""

    def __init__(self, ensembles: Ensembles, way: Way) -> None:
        """Take those that write.

        Raises:
            InputError: there are none, or one has on_failure="continue"; a name that is no text, or what is
                neither an ensemble nor a poll; a certified skip that none of them can make.
        """
        _check_named(ensembles)
        self._polls = {name: one for name, one in ensembles.items() if isinstance(one, Poll)}
        self._writing = {name: one for name, one in ensembles.items() if isinstance(one, Ensemble)}
        self._way = way
        if not self._writing:
            raise InputError("there is nothing to evaluate; give one ensemble or more")
        for name, one in self._writing.items():
            one.team.require_stop(f"answers of a smaller ensemble would count as those of {name}")
        self._skips = {
            name: way.certified_skip and one.fuser.search_bound() is not None
            for name, one in self._writing.items()
        }
        if way.certified_skip and not any(self._skips.values()):
            methods = list(dict.fromkeys(one.method for one in self._writing.values()))
            raise InputError(
                f"certified_skip bounds the inverse search, which {' and '.join(methods)} "
                f"{'has' if len(methods) == 1 else 'have'} not; leave it out, or give an ensemble of "
                'fuser="deepen" too'
            )

    def names(self) -> list[str]:
        """See `Writers`, as the rest."""
        return list(self._writing)

    def polls(self) -> dict[str, Poll]:  # noqa: D102
        return self._polls

    def headers(self) -> dict[str, Header]:  # noqa: D102
        return {
            name: configuration_header(
                name, one, certified_skip=self._skips[name], share_forwards=self._way.share_forwards
            )
            for name, one in self._writing.items()
        }

    def check_fusers(self, job: Job) -> None:  # noqa: D102
        for one in self._writing.values():
            check_fuser(type(one.fuser), isinstance(job.task, ChoiceTask), self._way.votes)

    def check_contexts(self, job: Job) -> None:  # noqa: D102
        check_contexts(job, self._members())

    def check_memory(self, job: Job) -> None:  # noqa: D102
        shared, each = [self._members()], [one.members for one in self._writing.values()]
        texts = 1 if self._way.votes is None else self._way.votes.count
        check_memory(job, shared if self._way.share_forwards else each, self._way.batch_size, texts)

    def _members(self) -> list[Member]:
        return list({id(one): one for own in self._writing.values() for one in own.members}.values())

    def answer(self, batches: Iterable[Batch]) -> Generator[Records, None, None]:  # noqa: D102
        for batch in batches:
            with closing(self._answer(batch)) as found:  # also after an interrupt: caches are freed
                yield from found

    def answer_whole(self, batch: Batch) -> list[Records]:
        """All records of one batch."""
        return list(self._answer(batch))

    def _answer(self, batch: Batch) -> Generator[Records, None, None]:
        way, some = self._way, {name: self._writing[name] for name in batch.names}
        if isinstance(batch.task, ChoiceTask):
            items = [item for item in batch.items if isinstance(item, ChoiceItem)]
            yield from score_choices(items, some, way.batch_size, shared=way.share_forwards)
            return
        with ExitStack() as sharing:
            # Of one ensemble nobody would ask for what was said again, and it is 2 GB of a long batch.
            some_share = way.share_forwards and len(some) > 1
            shared = sharing.enter_context(SharedForwards()) if some_share else None
            for name, ensemble in some.items():
                yield {name: _write(batch, ensemble, self._skips[name], shared, way)}


class WritersInReplicas:
    """The same ensembles in each of some replicas, among which the batches are shared out."""

    def __init__(self, pool: Pool) -> None:
        """Of replicas that hold `WritersHere`."""
        self._pool = pool

    def names(self) -> list[str]:
        """See `Writers`, as the rest."""
        found: list[str] = self._pool.ask(WritersHere.names)
        return found

    def polls(self) -> dict[str, Poll]:  # noqa: D102
        found: dict[str, Poll] = self._pool.ask(WritersHere.polls)
        return found

    def headers(self) -> dict[str, Header]:  # noqa: D102
        found: dict[str, Header] = self._pool.ask(WritersHere.headers)
        return found

    def check_fusers(self, job: Job) -> None:  # noqa: D102
        self._pool.ask(WritersHere.check_fusers, job)

    def check_contexts(self, job: Job) -> None:  # noqa: D102
        self._pool.ask(WritersHere.check_contexts, job)

    def check_memory(self, job: Job) -> None:  # noqa: D102
        self._pool.ask(WritersHere.check_memory, job)

    def answer(self, batches: Iterable[Batch]) -> Generator[Records, None, None]:  # noqa: D102
        for _, found in self._pool.share_out(WritersHere.answer_whole, ((batch,) for batch in batches)):
            yield from found


def make_writers(make: Callable[[], Ensembles], way: Way) -> WritersHere:
    """What a replica holds."""
    return WritersHere(make(), way)


def _check_named(ensembles: Mapping[Any, Any]) -> None:
    """Refuse names that name no file, and what cannot answer: left out, it would be missed in the results."""
    for name, one in ensembles.items():
        if not isinstance(name, str) or not name:
            raise InputError(
                f"{shown(name)} is no name of a configuration; give a text of one character or more: its "
                "files are named after it"
            )
        if isinstance(one, Member):
            raise InputError(f"{name} is a Member; give Ensemble([member], fuser='single')")
        if not isinstance(one, Ensemble | Poll):
            raise InputError(f"{name} is a {type(one).__name__}; give an Ensemble, or a Poll of others")


def _write(
    batch: Batch, ensemble: Ensemble, skip: bool, shared: SharedForwards | None, way: Way
) -> list[ItemRecord]:
    """What one configuration writes for a batch: all texts of all items in one call."""
    task, votes = batch.task, way.votes
    texts = [item for item in batch.items for _ in range(1 if votes is None else votes.count)]
    generations: BatchGeneration = ensemble.generate(
        [item.prompt for item in texts],
        max_new_tokens=task.max_new_tokens,
        stop_strings=list(task.stop_strings) or None,
        certified_skip=skip,
        shared=shared,
        batch_size=way.batch_size,
        **({} if votes is None else votes.settings(batch.items)),
    )
    timings, count = generations.timings, len(texts)
    timing = ItemTiming(
        prompt_ms=round(timings.prompt_ms / count, 4),
        decode_ms=round((timings.total_ms - timings.prompt_ms) / count, 4),
        rows=len(batch.items),
    )
    records = [
        ItemRecord(
            index=item.index,
            output=one.text,
            answer=task.answer(one.text),
            correct=task.correct(one.text, item),
            tokens=len(one.token_ids),
            changed=one.changed_tokens,
            finish_reason=one.finish_reason,
            timing=timing,
        )
        for item, one in zip(texts, generations, strict=True)
    ]
    if votes is None:
        return records
    return [
        counted(task, item, records[i * votes.count : (i + 1) * votes.count])
        for i, item in enumerate(batch.items)
    ]
