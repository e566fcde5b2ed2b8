"""From a rule's name to the rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.weighing.confidence import Confidence
from deepen_ext.fusers.weighing.consistency import Consistency
from deepen_ext.fusers.weighing.disagreement import Disagreement
from deepen_ext.fusers.weighing.gate import Gate
from deepen_ext.fusers.weighing.margin import Margin
from deepen_ext.fusers.weighing.rule import Rule


def make_rule(
    name: str, confidence: float, gate: Sequence[float] | None, bridge: Callable[[], TokenBridge]
) -> Rule | None:
    """The rule of these settings, which `check_weighing` has seen; None where weights stay as they are.

    Args:
        name: of `RULES`.
        confidence: of "confidence".
        gate: of "gate".
        bridge: called for a rule that compares members' tokens.
    """
    if name == "confidence":
        return Confidence(confidence) if confidence else None
    if gate is not None:
        return Gate(gate, bridge())
    if name == Disagreement.name:
        return Disagreement(bridge())
    return Margin() if name == Margin.name else Consistency()
