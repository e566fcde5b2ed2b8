"""The summary of an evaluation as a table for a terminal."""

from __future__ import annotations

from rich.table import Table

from deepen_ext.measure.evaluation.scores import ChoiceScore, Comparison, Rate, TextScore
from deepen_ext.measure.evaluation.summary import Summary


def summary_table(summary: Summary) -> Table:
    """One line for each task and configuration; where choices were scored one by each of the two metrics."""
    table = Table(
        show_edge=False,
        pad_edge=False,
        caption="points: paired with the best single member, which was picked on these same items",
    )
    table.add_column("task")
    table.add_column("configuration", overflow="fold")
    for column in ("n", "right, 95 %", "points, 95 %", "McNemar p", "changed", "no answer", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for task, of_task in summary.tasks.items():
        table.add_section()
        scores = of_task.configurations
        for name, score in scores.items():
            metric = ", acc" if isinstance(score, ChoiceScore) else ""
            _add(table, task + metric, name, score, score)
        for name, score in scores.items():
            if isinstance(score, ChoiceScore):
                _add(table, f"{task}, acc_norm", name, score, score.norm)
        for name, done in of_task.unfinished.items():
            table.add_row(task, name, f"{done} of {of_task.n}", "not finished")
        if of_task.left_out:
            table.add_row(task, "left out: without choices", str(of_task.left_out))
    return table


def _add(table: Table, task: str, name: str, score: TextScore | ChoiceScore, rate: Rate) -> None:
    low, high = rate.interval
    paired = rate.against_best_single
    changed = ""
    if isinstance(score, TextScore) and len(score.members) > 1:
        changed = f"{score.changed_share:.1%}"
    table.add_row(
        task,
        name,
        str(score.n),
        f"{rate.accuracy:.1%} ({low:.1%} to {high:.1%})",
        "" if paired is None else _difference(paired),
        "" if paired is None else f"{paired.p_value:.2g}",
        changed,
        f"{score.unanswered_share:.1%}",
        _time(score),
    )


def _time(score: TextScore | ChoiceScore) -> str:
    """Of the configuration's own, by what it does: tokens or items."""
    timing = score.timing
    if timing.shared_forwards:
        return ""
    if isinstance(score, ChoiceScore):
        return f"{timing.seconds / score.n:.2f} s an item"
    return "" if timing.ms_per_token is None else f"{timing.ms_per_token:.1f} ms a token"


def _difference(paired: Comparison) -> str:
    low, high = paired.interval
    return f"{100 * paired.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
