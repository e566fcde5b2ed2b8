"""What `tune` tried as a picture."""

from __future__ import annotations

import math

from deepen_ext.measure.tuning.configurations import Configuration
from deepen_ext.measure.tuning.tune import Tuning
from deepen_ext.plots.chart import Dot, run_plot
from deepen_ext.plots.picture import Picture


def tuning_plot(tuning: Tuning) -> Picture:
    """Bits a byte of each configuration in the order they were tried, over the members alone.

    Lines are two standard errors of the paired difference against uniform weights.
    """
    alone = list(zip(tuning.names, tuning.alone_bits_per_byte(), strict=True))
    values = [*map(tuning.bits_per_byte, tuning.tried), *(value for _, value in alone)]
    explanation = [
        "Lower is better. Blue: chosen. Lines: two standard errors of the difference to uniform weights."
    ]
    if not all(map(math.isfinite, values)):
        explanation.append("Arrows: an item has probability 0.")
    return run_plot(
        "Bits a byte of the items that were read, by configuration",
        " ".join(explanation),
        "configurations, in the order they were tried",
        [_dot(tuning, one) for one in tuning.tried],
        [(f"{name} alone", value) for name, value in alone],
    )


def _dot(tuning: Tuning, one: Configuration) -> Dot:
    value, (_, error) = tuning.bits_per_byte(one), tuning.difference(one)
    spread = 0.0 if one == tuning.baseline or not math.isfinite(error) else 2 * error
    return Dot(value, value - spread, value + spread, "gain" if one == tuning.chosen else "none")
