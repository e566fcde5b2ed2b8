"""Why no token can be chosen for a text."""

from __future__ import annotations

import math

from deepen_ext.errors import InputError


class ChoiceError(InputError):
    """No token can be chosen for a text.

    Attributes:
        text: its number.
    """

    def __init__(self, text: int, best: float) -> None:
        """Say why.

        Args:
            text: its number.
            best: the largest of its processed scores, which is not finite.
        """
        if math.isnan(best):
            said = "the processors give NaN; look at those of your own"
        elif best > 0:
            said = (
                "the processors make a score infinite: the model's logits are near the largest float32; "
                "raise the temperature, and bring penalties nearer to 1"
            )
        else:
            said = "the processors forbid every token; forbid fewer"
        super().__init__(text, best)  # both of them: so that it can be pickled
        self.text = text
        self._said = said

    def __str__(self) -> str:
        return f"text {self.text}: {self._said}"
