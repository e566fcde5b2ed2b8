"""What `eval` measured as a picture: the gains over the best single member."""

from __future__ import annotations

from collections.abc import Iterator

from deepen_ext.errors import InputError
from deepen_ext.measure.evaluation.scores import ChoiceScore, Comparison, Rate
from deepen_ext.measure.evaluation.summary import Summary
from deepen_ext.plots.chart import Column, Dot, Group, Row, Verdict, bounds, dot_plot
from deepen_ext.plots.picture import Picture


def gains_plot(summary: Summary) -> Picture:
    """Points against the best single member with 95 % intervals: a column for each task and metric.

    Raises:
        InputError: no configuration could be compared with its members alone.
    """
    measures = {title: rates for title, rates in _measures(summary) if rates}
    if not measures:
        raise InputError(
            "there is no gain to plot: no ensemble is finished, and all of its members alone beside it"
        )
    names = dict.fromkeys(name for rates in measures.values() for name in rates)
    rows = [
        Row(name, [_dot(rates[name]) if name in rates else None for rates in measures.values()])
        for name in names
    ]
    low, high = bounds((dot for row in rows for dot in row.dots), least=1.0)
    return dot_plot(
        "Points against the best single member, with 95 % intervals",
        "Right is better. Blue: better, orange: worse (McNemar, p < 0.05), hollow: neither.",
        [Column(title, low, high) for title in measures],
        [Group("fused", rows)],
    )


def _measures(summary: Summary) -> Iterator[tuple[str, dict[str, Comparison]]]:
    for task, of_task in summary.tasks.items():
        scores = of_task.configurations
        choices = {name: one for name, one in scores.items() if isinstance(one, ChoiceScore)}
        if choices:
            yield f"{task}, acc", _paired(dict(choices))
            yield f"{task}, acc_norm", _paired({name: one.norm for name, one in choices.items()})
        else:
            yield task, _paired(dict(scores))


def _paired(rates: dict[str, Rate]) -> dict[str, Comparison]:
    found = ((name, one.against_best_single) for name, one in rates.items())
    return {name: paired for name, paired in found if paired is not None}


def _dot(paired: Comparison) -> Dot:
    low, high = paired.interval
    sure = paired.p_value < 0.05
    verdict: Verdict = ("gain" if paired.difference > 0 else "harm") if sure else "none"
    return Dot(100 * paired.difference, 100 * low, 100 * high, verdict)
