"""What `nll` measured as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deepen_ext.measure.likelihood.scoring import Scores
from deepen_ext.measure.likelihood.token_likelihoods import Estimate
from deepen_ext.plots.chart import Column, Dot, Group, Row, Verdict, bounds, dot_plot
from deepen_ext.plots.picture import Picture


def likelihood_plot(scores: Scores, methods: Sequence[str]) -> Picture:
    """Bits a byte of each member alone and of each way to fuse, and what fusing changes.

    Intervals are two standard errors. A text of probability 0 has an arrow at the edge.
    """
    singles = list(dict.fromkeys([scores.best_single, scores.main]))
    alone = [Row(name, [_absolute(scores, name), *(None for _ in singles)]) for name in scores.alone]
    fused = [
        Row(
            name,
            [_absolute(scores, name), *(_relative(scores, name, single) for single in singles)],
            strong=True,
        )
        for name in methods
    ]
    shown = [row.dots[0] for row in (*alone, *fused) if row.dots[0] is not None]
    finite = [one for one in shown if math.isfinite(one.value)]
    low, high = (min(one.low for one in finite), max(one.high for one in finite)) if finite else (0.0, 1.0)
    spare = 0.06 * (high - low) or 0.1
    differences = bounds((dot for row in fused for dot in row.dots[1:]), least=0.01)
    titles = [f"less {_role(scores, single)}'s" for single in singles]
    columns = [Column("bits a byte", low - spare, high + spare, signed=False)]
    columns += [Column(title, *differences) for title in titles]
    return dot_plot(
        f"Bits a byte of {scores.score(scores.main).nbytes:,} bytes of text",
        "Left is better. Lines: two standard errors. Blue: better, orange: worse, hollow: neither.",
        columns,
        [Group("alone", alone), Group("fused", fused)],
    )


def _role(scores: Scores, single: str) -> str:
    return "the best member" if single == scores.best_single else "the main model"


def _absolute(scores: Scores, name: str) -> Dot | None:
    return _dot(scores.score(name).bits_per_byte, "single")


def _relative(scores: Scores, method: str, single: str) -> Dot | None:
    found = scores.against(method, single).bits_per_byte
    verdict: Verdict = "none"
    sure = found.error is not None and abs(found.value) > 2 * found.error
    if sure or math.isinf(found.value):  # one of the two gives the text probability 0
        verdict = "gain" if found.value < 0 else "harm"
    return _dot(found, verdict)


def _dot(found: Estimate, verdict: Verdict) -> Dot | None:
    """None where there is no number: both of two texts have probability 0."""
    if math.isnan(found.value):
        return None
    error = 2 * (found.error or 0.0)
    return Dot(found.value, found.value - error, found.value + error, verdict)
