"""Some ensembles over the same items of some tasks, batch by batch, on files that survive a kill."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from time import perf_counter

from deepen_ext.decoding.generation import BatchGeneration
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import whole_number
from deepen_ext.measure.evaluation.choice_scores import score_choices
from deepen_ext.measure.evaluation.choices import ChoiceItem, ChoiceTask
from deepen_ext.measure.evaluation.headers import Header, configuration_header, make_header
from deepen_ext.measure.evaluation.jobs import Clock, Job, Progress, read_jobs
from deepen_ext.measure.evaluation.limits import check_contexts, check_memory
from deepen_ext.measure.evaluation.records import (
    ItemRecord,
    ItemTiming,
    Record,
    RecordFile,
    check_folder,
    output_folder,
    record_path,
)
from deepen_ext.measure.evaluation.summary import Summary, summarise, write_summary
from deepen_ext.measure.evaluation.tasks import Item, Task
from deepen_ext.measure.evaluation.votes import Poll, Votes, counted

DEFAULT_BATCH = 16
_LONG = 16  # new tokens; answers that may take more end at different times
# Batches that are run as one: where answers are long, because the next item begins where an answer ends, and
# of choices, because neighbours have demos in common.
_BATCHES = 4


def evaluate(
    ensembles: Mapping[str, Ensemble | Poll],
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
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Let every ensemble answer the same items, greedily or by votes, and compare what it says or prefers.

    A call that was ended half way, however that happened, goes on where it ended when it is given again. All
    configurations run a batch before the next batch begins, so that they share forwards; what a configuration
    wrote for a batch is on the disk before the next configuration begins.

    Args:
        ensembles: by the name of the configuration. A member alone is ``Ensemble([member], fuser="single")``;
            a fused ensemble is compared with its best member if each of its members is there alone. A `Poll`
            writes nothing: what others of these wrote votes.
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
        certified_skip: for ensembles fused by "deepen": ask the assistants only where they can matter.
        share_forwards: read a prompt once for all ensembles of a member. Times are then not each ensemble's
            own; False gives times that can be compared.
        votes: texts of an item; 2 or more are sampled, and the item's answer is the one that most of them
            give (see `votes.py`). 1 is one greedy text.
        temperature: of sampling, with votes; 0.7 by default.
        top_p: of sampling, with votes; 0.95 by default.
        seed: of sampling, with votes; 0 by default.
        fresh: drop what the folder holds of these tasks.
        on_progress: called at the beginning of a task and after each batch of a configuration.

    Returns:
        The summary of all that the folder holds.

    Raises:
        InputError: see `prepare`; no ensembles, one with on_failure="continue", a setting out of range, a
            prompt that does not fit a member's context, batches that do not fit the memory, files of a run
            with other settings.
        ModelError: a member's forward pass failed or it was lost, or the disk is full. What is done is kept.
    """
    folder = Path(out)
    polls = {name: one for name, one in ensembles.items() if isinstance(one, Poll)}
    writers = {name: one for name, one in ensembles.items() if isinstance(one, Ensemble)}
    if not writers:
        raise InputError("there is nothing to evaluate; give one ensemble or more")
    for name, writer in writers.items():
        if writer.team.on_failure != "stop":
            raise InputError(
                f"{name}: with on_failure='continue' answers of a smaller ensemble would count as this "
                "one's; use variant(on_failure='stop'). Given again, the call goes on where it ended"
            )
    drawn = Votes.read(votes, temperature, top_p, seed)
    if drawn is not None and certified_skip:
        raise InputError("certified_skip holds for greedy decoding only; leave it out, or votes")
    batch_size = whole_number("the batch size", batch_size, 1)
    if scoring == "likelihood":
        for name, given in (("certified_skip", certified_skip), ("votes", drawn), ("a vote", polls)):
            if given:
                raise InputError(
                    f"{name} is for texts that are written; leave it out with scoring='likelihood'"
                )
    named = [tasks] if isinstance(tasks, str) else tasks
    jobs = read_jobs(named, Path(data), split, limit, scoring, drawn)
    members = {id(member): member for one in writers.values() for member in one.members}
    at_once = [list(members.values())] if share_forwards else [one.members for one in writers.values()]
    for job in jobs:
        check_contexts(job, list(members.values()))
        if fresh or not _is_done(folder, job, writers):
            check_memory(job, at_once, batch_size, votes)
    skips = {name: certified_skip and one.fuser.search_bound() is not None for name, one in writers.items()}
    configurations = {
        name: configuration_header(name, one, certified_skip=skips[name], share_forwards=share_forwards)
        for name, one in writers.items()
    }
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
            by_choices = isinstance(job.task, ChoiceTask)
            at_a_time = by_choices or (share_forwards and job.task.max_new_tokens > _LONG)
            size = max(1, batch_size * (_BATCHES if at_a_time else 1) // votes)
            writing = {name: files[name] for name in writers}
            for batch, everyone in _batches(job.items, writing, size):
                indices = {item.index for item in batch}
                some = {name: one for name, one in writers.items() if everyone or indices - files[name].done}
                found: Generator[Mapping[str, Sequence[Record]], None, None]
                if by_choices:
                    items = [item for item in batch if isinstance(item, ChoiceItem)]
                    found = score_choices(items, some, batch_size, shared=share_forwards)
                else:
                    found = _write(job.task, batch, some, skips, share_forwards, batch_size, drawn)
                began = perf_counter()
                with closing(found):  # also after an interrupt: caches are freed
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
    paths = [record_path(folder, job.task.name, name) for name in names]
    return all(path.exists() and len(RecordFile.read(path)[1]) == len(job.items) for path in paths)


def _open(
    stack: ExitStack, folder: Path, job: Job, headers: Mapping[str, Header], fresh: bool
) -> dict[str, RecordFile]:
    """The files of a task, by configuration."""
    paths = {name: record_path(folder, job.task.name, name) for name in headers}
    if len(set(paths.values())) < len(paths):
        raise InputError(f"two of {', '.join(paths)} would have the same file; give them other names")
    if fresh:
        for path in folder.glob(f"{job.task.name}.*.jsonl"):
            path.unlink()
    check_folder(folder, job.header)
    known = {item.index for item in job.items}
    files = {}
    for name, path in paths.items():
        files[name] = stack.enter_context(RecordFile(path, headers[name]))
        if strange := files[name].done - known:
            raise InputError(f"{path}: item {min(strange)} is none of this task's; begin it anew (--fresh)")
    return files


def _batches(
    items: Sequence[Item], files: Mapping[str, RecordFile], size: int
) -> Iterator[tuple[Sequence[Item], bool]]:
    """The batches in which a record is missing, each with whether all configurations are to run it.

    The batch that a killed run was in is run whole and by all configurations, also by those that have its
    records: rounding depends on which forwards were shared, and so the missing records come out as they would
    have without the kill.
    """
    everyone = True
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        if any(item.index not in one.done for one in files.values() for item in batch):
            yield batch, everyone
            everyone = False


def _write(
    task: Task,
    batch: Sequence[Item],
    ensembles: Mapping[str, Ensemble],
    skips: Mapping[str, bool],
    share_forwards: bool,
    batch_size: int,
    votes: Votes | None,
) -> Generator[dict[str, list[ItemRecord]], None, None]:
    """What each configuration writes for a batch, one after the other."""
    with ExitStack() as sharing:
        shared = sharing.enter_context(SharedForwards()) if share_forwards else None
        for name, ensemble in ensembles.items():
            yield {name: _run(task, batch, ensemble, skips[name], shared, batch_size, votes)}


def _run(
    task: Task,
    batch: Sequence[Item],
    ensemble: Ensemble,
    skip: bool,
    shared: SharedForwards | None,
    batch_size: int,
    votes: Votes | None,
) -> list[ItemRecord]:
    """What one configuration writes for a batch: all texts of all items in one call."""
    texts = [item for item in batch for _ in range(1 if votes is None else votes.count)]
    generations: BatchGeneration = ensemble.generate(
        [item.prompt for item in texts],
        max_new_tokens=task.max_new_tokens,
        stop_strings=list(task.stop_strings) or None,
        certified_skip=skip,
        shared=shared,
        batch_size=batch_size,
        **({} if votes is None else votes.settings(batch)),
    )
    timings, count = generations.timings, len(texts)
    timing = ItemTiming(
        prompt_ms=round(timings.prompt_ms / count, 4),
        decode_ms=round((timings.total_ms - timings.prompt_ms) / count, 4),
        rows=len(batch),
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
        counted(task, item, records[i * votes.count : (i + 1) * votes.count]) for i, item in enumerate(batch)
    ]
