"""Rules by name, and what goes with each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deepen_ext.errors import InputError
from deepen_ext.fusers.weighing.confidence import Confidence
from deepen_ext.fusers.weighing.consistency import Consistency
from deepen_ext.fusers.weighing.disagreement import Disagreement
from deepen_ext.fusers.weighing.gate import GATE_NUMBERS, Gate
from deepen_ext.fusers.weighing.margin import Margin
from deepen_ext.fusers.weighing.rule import Rule
from deepen_ext.ground.numbers import real_number

_CLASSES: list[type[Rule]] = [Confidence, Margin, Consistency, Disagreement, Gate]
RULES = {one.name: one for one in _CLASSES}


def check_weighing(rule: Any, confidence: float, gate: Sequence[float] | None) -> None:
    """Check that there is such a rule, and that it has the numbers it needs and no others.

    Raises:
        InputError: there is not, or it has not.
    """
    if rule not in RULES:
        raise InputError(f"weighing is {rule!r}; use one of {', '.join(RULES)}")
    if confidence and rule != "confidence":
        raise InputError(f"confidence goes with weighing='confidence'; leave it out for weighing='{rule}'")
    if (gate is not None) != (rule == "gate"):
        advice = "run deepen-ext tune --gate, and use the preset that it writes"
        if gate is not None:
            advice = f"give weighing='gate' with it, or leave it out for weighing='{rule}'"
        raise InputError(f"weighing='gate' and the numbers of a gate go together; {advice}")
    if gate is None:
        return
    if isinstance(gate, str) or not isinstance(gate, Sequence) or len(gate) != GATE_NUMBERS:
        raise InputError(f"gate is {gate!r}; give a list of {GATE_NUMBERS} numbers")
    for number in gate:
        real_number("a number of the gate", number, "finite", math.isfinite)
