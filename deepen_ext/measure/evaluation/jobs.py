"""The tasks of an evaluation, read and checked before a model is loaded, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deepen_ext.errors import InputError
from deepen_ext.measure.evaluation.choices import CHOICE_TASKS, ChoiceTask
from deepen_ext.measure.evaluation.headers import Header, task_header
from deepen_ext.measure.evaluation.records import check_folder, output_folder
from deepen_ext.measure.evaluation.tasks import TASKS, Item, Task
from deepen_ext.measure.evaluation.votes import Votes

SCORINGS = ("generation", "likelihood")

# For the estimate of the time left, before a task has been timed: a new token costs about as much as reading
# 16 characters, and few answers take more than 128 tokens.
_CHARACTERS_A_TOKEN = 16
_USUAL_TOKENS = 128


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is. A record is what one configuration writes for one item.

    Attributes:
        task: the task that runs.
        number: which of the `tasks` it is, from 1.
        tasks: how many tasks there are.
        configuration: the configuration whose records were written last; "" at the beginning of a task.
        done: records of the task that are written, in earlier calls too.
        records: of the task, in all.
        share: of all work that is done, 0 to 1, by an estimate of what an item costs.
        seconds_left: about; None before anything has been timed.
    """

    task: str
    number: int
    tasks: int
    configuration: str
    done: int
    records: int
    share: float
    seconds_left: float | None


@dataclass
class Job:
    """One task: its items, how many records are left to write, and what was timed in this call."""

    task: Task
    items: Sequence[Item]
    header: Header
    left: int = 0
    timed_records: int = 0
    timed_seconds: float = 0.0

    @property
    def guess(self) -> float:
        """What a record costs, in characters to read."""
        read = sum(len(item.to_read) for item in self.items) / len(self.items)
        return read + _CHARACTERS_A_TOKEN * min(self.task.max_new_tokens, _USUAL_TOKENS)


def tasks_of(scoring: str) -> Mapping[str, Task]:
    """The tasks that can be scored so, by name.

    Raises:
        InputError: no such scoring.
    """
    if scoring not in SCORINGS:
        raise InputError(f"scoring is {scoring!r}; use one of {', '.join(SCORINGS)}")
    return CHOICE_TASKS if scoring == "likelihood" else TASKS


def read_jobs(
    names: Sequence[str],
    data: Path,
    split: str,
    limit: int | None,
    scoring: str = "generation",
    votes: Votes | None = None,
) -> list[Job]:
    """The tasks with their items; one that is named twice is done once.

    Raises:
        InputError: no task, an unknown one, or one that cannot be scored so; no such scoring, split or file,
            a limit below 1, a split without items.
    """
    tasks = tasks_of(scoring)
    if not names:
        raise InputError(f"there is no task; name one or more of {', '.join(tasks)}")
    jobs = []
    for name in dict.fromkeys(names):
        if name not in TASKS:
            raise InputError(f"{name}: no such task; there are {', '.join(tasks)}")
        if name not in tasks:
            raise InputError(
                f"{name} has no choices; likelihood can score {', '.join(tasks)}. Leave the task out, or let "
                "the models write: scoring='generation' (--scoring generation)"
            )
        task, left_out = tasks[name], 0
        items: Sequence[Item]
        if isinstance(task, ChoiceTask):
            items, left_out = task.choice_items(data, split, limit)
        else:
            items = task.items(data, split, limit)
        if not items:
            without = f" with choices, and {left_out} without" if left_out else ""
            raise InputError(f"{name}: its {split} split in {data} has no items{without}")
        header = task_header(task, split, items, left_out)
        jobs.append(Job(task, items, header | ({} if votes is None else {"votes": asdict(votes)})))
    return jobs


def check_way(scoring: str, votes: Votes | None, certified_skip: bool) -> None:
    """Check that ways of answering go together.

    Raises:
        InputError: votes or the certified skip where no text is written, or the skip where texts are sampled.
    """
    if scoring == "likelihood":
        refuse_by_likelihood("certified_skip", certified_skip)
        refuse_by_likelihood("votes", votes)
    if votes is not None and certified_skip:
        raise InputError("certified_skip holds for greedy decoding only; leave it out, or votes")


def refuse_by_likelihood(what: str, given: object) -> None:
    """Refuse what is for texts that are written.

    Raises:
        InputError: it is given.
    """
    if given:
        raise InputError(f"{what} is for texts that are written; leave it out with scoring='likelihood'")


def prepare(
    names: Sequence[str],
    data: Path,
    split: str,
    limit: int | None,
    out: Path,
    *,
    scoring: str = "generation",
    votes: Votes | None = None,
    certified_skip: bool = False,
    fresh: bool = False,
) -> None:
    """Everything that can be checked before a model is loaded; `evaluate` does it again.

    Raises:
        InputError: see `read_jobs` and `check_way`; a folder that cannot be written to, or holds results of
            other items or with other votes.
    """
    check_way(scoring, votes, certified_skip)
    jobs = read_jobs(names, data, split, limit, scoring, votes)
    with output_folder(out):
        for job in jobs if not fresh else []:
            check_folder(out, job.header)


@dataclass(frozen=True)
class Clock:
    """Counts records, and estimates the time for the rest: by what a record of the task has taken so far.

    Attributes:
        jobs: with the records that are `left` of each.
        configurations: how many there are.
        on_progress: is told.
    """

    jobs: Sequence[Job]
    configurations: int
    on_progress: Callable[[Progress], None] | None

    def count(self, job: Job, records: int, seconds: float) -> None:
        """Note how many records were written, and how long that took."""
        job.left -= records
        job.timed_records += records
        job.timed_seconds += seconds

    def tell(self, job: Job, configuration: str = "") -> None:
        """Say how far the evaluation is."""
        if self.on_progress is None:
            return
        records = self.configurations * len(job.items)
        whole = sum(self.configurations * len(one.items) * one.guess for one in self.jobs)
        left = sum(one.left * one.guess for one in self.jobs)
        progress = Progress(
            task=job.task.name,
            number=self.jobs.index(job) + 1,
            tasks=len(self.jobs),
            configuration=configuration,
            done=records - job.left,
            records=records,
            share=1 - left / whole,
            seconds_left=self._seconds_left(),
        )
        self.on_progress(progress)

    def _seconds_left(self) -> float | None:
        timed = sum(one.timed_records * one.guess for one in self.jobs)
        if not timed:
            return None if any(one.left for one in self.jobs) else 0.0
        pace = sum(one.timed_seconds for one in self.jobs) / timed
        return sum(
            one.left * (one.timed_seconds / one.timed_records if one.timed_records else one.guess * pace)
            for one in self.jobs
        )
