"""The summary of an evaluation as a table for a terminal."""

from __future__ import annotations

from rich.table import Table

from deepen_ext.measure.evaluation.summary import Comparison, Summary


def summary_table(summary: Summary) -> Table:
    """One line for each task and configuration."""
    table = Table(
        show_edge=False,
        pad_edge=False,
        caption="points: paired with the best single member, which was picked on these same items",
    )
    table.add_column("task")
    table.add_column("configuration", overflow="fold")
    points = "right, 95 %", "points, 95 %", "McNemar p"
    for column in ("n", "votes", *points, "changed", "no answer", "ms a token"):
        table.add_column(column, justify="right", no_wrap=True)
    for task, of_task in summary.tasks.items():
        table.add_section()
        for name, score in of_task.configurations.items():
            low, high = score.interval
            paired, timing = score.against_best_single, score.timing
            own_time = not timing.shared_forwards and timing.ms_per_token is not None
            table.add_row(
                task,
                name,
                str(score.n),
                str(score.votes),
                f"{score.accuracy:.1%} ({low:.1%} to {high:.1%})",
                "" if paired is None else _difference(paired),
                "" if paired is None else f"{paired.p_value:.2g}",
                "" if len(score.members) == 1 else f"{score.changed_share:.1%}",
                f"{score.unanswered_share:.1%}",
                f"{timing.ms_per_token:.1f}" if own_time else "",
            )
        for name, done in of_task.unfinished.items():
            table.add_row(task, name, f"{done} of {of_task.n}", "", "not finished")
    return table


def _difference(paired: Comparison) -> str:
    low, high = paired.interval
    return f"{100 * paired.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
