"""Rules by name, and what goes with each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deepen_ext.errors import InputError, shown
from deepen_ext.fusers.weighing.confidence import Confidence
from deepen_ext.fusers.weighing.consistency import Consistency
from deepen_ext.fusers.weighing.disagreement import Disagreement
from deepen_ext.fusers.weighing.gate import GATE_NUMBERS, Gate
from deepen_ext.fusers.weighing.margin import Margin
from deepen_ext.fusers.weighing.rule import Rule
from deepen_ext.ground.numbers import real_number

_CLASSES: list[type[Rule]] = [Confidence, Margin, Consistency, Disagreement, Gate]
RULES = {one.name: one for one in _CLASSES}


def check_rule(name: Any) -> None:
    """Raise InputError for what is no name of a rule."""
    if not isinstance(name, str) or name not in RULES:
        raise InputError(f"weighing is {shown(name)}; use one of {', '.join(RULES)}")


def check_weighing(rule: Any, confidence: float, gate: Sequence[float] | None) -> tuple[float, ...] | None:
    """Check that there is such a rule, and that it has the numbers it needs and no others.

    Returns:
        the gate, as floats.

    Raises:
        InputError: there is not, or it has not.
    """
    check_rule(rule)
    if confidence and rule != "confidence":
        raise InputError(f"confidence goes with weighing='confidence'; leave it out for weighing='{rule}'")
    if (gate is not None) != (rule == "gate"):
        advice = "run deepen-ext tune --gate, and use the preset that it writes"
        if gate is not None:
            advice = f"give weighing='gate' with it, or leave it out for weighing='{rule}'"
        raise InputError(f"weighing='gate' and the numbers of a gate go together; {advice}")
    if gate is None:
        return None
    if isinstance(gate, str) or not isinstance(gate, Sequence) or len(gate) != GATE_NUMBERS:
        raise InputError(f"gate is {gate!r}; give a list of {GATE_NUMBERS} numbers")
    return tuple(real_number("a number of the gate", number, "finite", math.isfinite) for number in gate)
