"""Some ensembles over the same items of some tasks, batch by batch, on files that survive a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from deepen_ext.cluster.pool import Pool
from deepen_ext.errors import InputError, shown
from deepen_ext.ground.numbers import true_or_false, whole_number
from deepen_ext.measure.evaluation.choices import ChoiceTask
from deepen_ext.measure.evaluation.headers import Header, make_header
from deepen_ext.measure.evaluation.jobs import (
    Clock,
    Job,
    Progress,
    check_way,
    read_jobs,
    refuse_by_likelihood,
)
from deepen_ext.measure.evaluation.records import (
    ItemRecord,
    RecordFile,
    check_folder,
    output_folder,
    record_path,
)
from deepen_ext.measure.evaluation.summary import Summary, summarise, write_summary
from deepen_ext.measure.evaluation.votes import Votes
from deepen_ext.measure.evaluation.writers import (
    Batch,
    Ensembles,
    Way,
    Writers,
    WritersHere,
    WritersInReplicas,
    make_writers,
)

DEFAULT_BATCH = 16
_LONG = 16  # new tokens; answers that may take more end at different times
# Batches that are run as one: where answers are long, because the next item begins where an answer ends, and
# of choices, because neighbours have demos in common.
_BATCHES = 4
_LONGEST_NAME = 255  # of a file, on Linux


def evaluate(
    ensembles: Ensembles | Callable[[], Ensembles],
    tasks: str | Sequence[str],
    data: str | Path,
    *,
    out: str | Path,
    split: str = "test",
    limit: int | None = None,
    scoring: str = "generation",
    batch_size: int = DEFAULT_BATCH,
    certified_skip: bool = False,
    share_forwards: bool = True,
    votes: int = 1,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    fresh: bool = False,
    replicas: int | None = None,
    placement: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Summary:
    """Let every ensemble answer the same items, greedily or by votes, and compare what it says or prefers.

    A call that was ended half way, however that happened, goes on where it ended when it is given again. All
    configurations run a batch before the next batch begins, so that they share forwards; what a configuration
    wrote for a batch is on the disk before the next configuration begins.

    Args:
        ensembles: by the name of the configuration. A member alone is ``Ensemble([member], fuser="single")``;
            a fused ensemble is compared with its best member if each of its members is there alone. A `Poll`
            writes nothing: what others of these wrote votes. With replicas a function that makes them.
        tasks: names in `TASKS`, one or more.
        data: folder with a folder for each task.
        out: folder for ``<task>.<configuration>.jsonl`` and ``summary.json``.
        split: "dev" or "test".
        limit: the most items of each task, spread evenly over it; None for all.
        scoring: "generation": every ensemble writes an answer, which is compared. "likelihood": of tasks with
            choices, the most probable one (`choices.py`); items without choices are left out.
        batch_size: texts written side by side. With long answers and shared forwards four batches are run
            as one, in which the next item begins where an answer ends. Of choices: items between two writes
            to the disk.
        certified_skip: for ensembles fused by "deepen", one or more: ask the assistants only where they can
            matter. The others go on without it.
        share_forwards: read a prompt once for all ensembles of a member. Times are then not each ensemble's
            own; False gives times that can be compared.
        votes: texts of an item; 2 or more are sampled, and the item's answer is the one that most of them
            give (see `votes.py`). 1 is one greedy text.
        temperature: of sampling, with votes; 0.7 by default.
        top_p: of sampling, with votes; 0.95 by default.
        seed: of sampling, with votes; 0 by default.
        fresh: drop what the folder holds of these tasks.
        replicas: actors of Ray that call the function `ensembles` and share the batches out among them. This
            process loads no model and writes all files. A replica that is lost has its batch done by another.
            None for ensembles in this process.
        placement: of each replica (see `deepen_ext.cluster.placement`); None for one CPU anywhere.
        on_progress: called at the beginning of a task and after each batch of a configuration.
        on_line: called with a line of text as replicas start, and when one is lost.

    Returns:
        The summary of all that the folder holds.

    Raises:
        InputError: see `prepare`; no ensembles, one with on_failure="continue" or with a fuser that cannot
            answer so (see `limits.check_fuser`), a setting out of range, a prompt that does not fit a
            member's context, batches that do not fit the memory, files of a run with other settings.
        ModelError: a member's forward pass failed or it was lost, all replicas are lost, or the disk is full.
            What is done is kept.
    """
    switches = {"certified_skip": certified_skip, "share_forwards": share_forwards, "fresh": fresh}
    for name, value in switches.items():  # "no" would drop what the folder holds
        true_or_false(name, value)
    drawn = Votes.read(votes, temperature, top_p, seed)
    check_way(scoring, drawn, certified_skip)
    batch_size = whole_number("the batch size", batch_size, 1)
    way = Way(batch_size, certified_skip, share_forwards, drawn)
    here = None
    if isinstance(ensembles, Mapping):
        if replicas is not None:
            raise InputError("with replicas give a function that makes the ensembles: each replica calls it")
        if placement is not None:
            raise InputError("placement is for replicas; give replicas=N too, or leave it out")
        here = WritersHere(ensembles, way)
    elif replicas is None:
        raise InputError("a function that makes the ensembles is for replicas; give replicas=N")
    named = [tasks] if isinstance(tasks, str) else tasks
    jobs = read_jobs(named, Path(data), split, limit, scoring, drawn)
    run = partial(_run, jobs, Path(out), way, fresh, on_progress)
    if isinstance(ensembles, Mapping) or replicas is None:
        assert here is not None
        return run(here)
    with Pool(partial(make_writers, ensembles, way), replicas, placement, on_line) as pool:
        return run(WritersInReplicas(pool))


def _run(
    jobs: Sequence[Job],
    folder: Path,
    way: Way,
    fresh: bool,
    on_progress: Callable[[Progress], None] | None,
    writers: Writers,
) -> Summary:
    names, polls = writers.names(), writers.polls()
    for job in jobs:
        _paths(folder, job, [*names, *polls])
        if isinstance(job.task, ChoiceTask):
            refuse_by_likelihood("a vote", polls)
        writers.check_fusers(job)
        writers.check_contexts(job)
        if fresh or not _is_done(folder, job, names):
            writers.check_memory(job)
    configurations = writers.headers()
    configurations |= {name: one.header(name, configurations) for name, one in polls.items()}
    with output_folder(folder), ExitStack() as stack:
        opened = []
        for job in jobs:
            headers = {name: make_header(job.header, one) for name, one in configurations.items()}
            files = _open(stack, folder, job, headers, fresh)
            job.left = sum(len(job.items) - len(one.done) for one in files.values())
            opened.append(files)
        clock = Clock(jobs, len(configurations), on_progress)
        for job, files in zip(jobs, opened, strict=True):
            clock.tell(job)
            began = perf_counter()
            with closing(writers.answer(_batches(job, {name: files[name] for name in names}, way))) as found:
                for records in found:
                    seconds = (perf_counter() - began) / len(records)
                    for name, own in records.items():
                        missing = [one for one in own if one.index not in files[name].done]
                        files[name].append(missing)
                        clock.count(job, len(missing), seconds)
                        clock.tell(job, name)
                    began = perf_counter()
            for name, poll in polls.items():
                left = [item for item in job.items if item.index not in files[name].done]
                written = {one: _texts(files[one].path) for one in poll.voters}
                files[name].append(poll.records(job.task, left, written))
                clock.count(job, len(left), 0.0)
                clock.tell(job, name)
            summary = summarise(folder)
            write_summary(folder, summary)
        return summary


def _texts(path: Path) -> list[ItemRecord]:
    """The records of a file of texts that were written."""
    return [one for one in RecordFile.read(path)[1] if isinstance(one, ItemRecord)]


def _is_done(folder: Path, job: Job, names: Iterable[str]) -> bool:
    """Whether the folder has every answer of the task: then nothing is run."""
    paths = _paths(folder, job, names).values()
    return all(path.exists() and len(RecordFile.read(path)[1]) == len(job.items) for path in paths)


def _paths(folder: Path, job: Job, names: Iterable[str]) -> dict[str, Path]:
    """The files of a task by configuration, each with a name of its own that a file can have."""
    paths = {name: record_path(folder, job.task.name, name) for name in names}
    if len(set(paths.values())) < len(paths):
        raise InputError(f"two of {', '.join(paths)} would have the same file; give them other names")
    if long := [name for name, path in paths.items() if len(path.name) > _LONGEST_NAME]:
        raise InputError(
            f"{shown(long[0], 60)}: its results' file would have a name of more than {_LONGEST_NAME} "
            "characters; give that model's folder, or that configuration, a shorter name"
        )
    return paths


def _open(
    stack: ExitStack, folder: Path, job: Job, headers: Mapping[str, Header], fresh: bool
) -> dict[str, RecordFile]:
    """The files of a task, by configuration."""
    paths = _paths(folder, job, headers)
    if fresh:
        for path in folder.glob(f"{job.task.name}.*.jsonl"):
            try:
                path.unlink()
            except OSError as error:
                raise InputError(
                    f"{path}: cannot be removed ({error.strerror}); remove it yourself, or name another "
                    "folder"
                ) from error
    check_folder(folder, job.header)
    known = {item.index for item in job.items}
    files = {}
    for name, path in paths.items():
        files[name] = stack.enter_context(RecordFile(path, headers[name]))
        if strange := files[name].done - known:
            raise InputError(f"{path}: item {min(strange)} is none of this task's; begin it anew (--fresh)")
    return files


def _batches(job: Job, files: Mapping[str, RecordFile], way: Way) -> Iterator[Batch]:
    """The batches in which a record is missing, with the configurations that are to run them.

    The batch that a killed run was in is run whole and by all configurations, also by those that have its
    records: rounding depends on which forwards were shared, and so the missing records come out as they would
    have without the kill.
    """
    at_a_time = isinstance(job.task, ChoiceTask) or (way.share_forwards and job.task.max_new_tokens > _LONG)
    votes = 1 if way.votes is None else way.votes.count
    size = max(1, way.batch_size * (_BATCHES if at_a_time else 1) // votes)
    everyone = True
    for start in range(0, len(job.items), size):
        items = job.items[start : start + size]
        indices = {item.index for item in items}
        lacking = [name for name, file in files.items() if indices - file.done]
        if lacking:
            yield Batch(job.task, items, list(files) if everyone else lacking)
            everyone = False
