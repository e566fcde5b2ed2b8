"""One fusion step: members' logits in, the main model's new logits out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepen_ext import ops
from deepen_ext.errors import InputError
from deepen_ext.ops.topk_softmax import check_status
from deepen_ext.relative_map import RelativeMap

_SHARES_KEPT = 256  # weights on the device, for that many different sets of members and weights


def fuse_logits(
    logits: Sequence[torch.Tensor],
    maps: Sequence[RelativeMap],
    weights: Sequence[float],
    *,
    learning_rate: float,
    steps: int = 5,
    candidates: int = 128,
) -> torch.Tensor:
    """One DeePEn step (arXiv 2404.12715, sections 3.2 to 3.4).

        r_i    = softmax(logits_i) R_i                 each member in relative space
        target = sum_i weights_i r_i                   their average
        z      = argmin_z KL(target || softmax(z) R_0)   `steps` AdamW steps from the main model's logits

    Only the `candidates` most probable tokens of a member are mapped one by one; the rest of its probability
    is spread evenly over the anchors. Only the main model's candidates move. With `candidates` at the
    vocabulary's size nothing is left out.

    Args:
        logits: of each member, the main model first; float32, float16 or bfloat16 [B, V_i], contiguous.
        maps: their relative maps, over the same anchors. Rows still missing are computed and kept.
        weights: lambda_i, not negative, summing to 1.
        learning_rate: eta of the inverse search, above 0 to 10; the paper uses 0.1 to 0.5.
        steps: T of the inverse search, 1 to 64.
        candidates: K, 1 or more.

    Returns:
        [B, V_main], in the dtype of the main model's logits; the inputs are left as they are.

    Raises:
        InputError: settings out of range; shapes, dtypes or devices that do not fit; NaN in some member's
            logits. On CUDA nothing waits for the device, so NaN raises nothing and gives that row unspecified
            logits: `Fuser.step(...).check()` tells.
    """
    fuser = Fuser(maps, learning_rate=learning_rate, steps=steps, candidates=candidates)
    return fuser.step(logits, check_weights(weights, len(maps))).logits


def check_weights(weights: Sequence[float], members: int) -> list[float]:
    """The weights as floats.

    Raises:
        InputError: not one for each member, negative, not finite, or not summing to 1.
    """
    weights = [float(weight) for weight in weights]
    if len(weights) != members:
        raise InputError(f"there are {len(weights)} weights for {members} members; give one for each")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise InputError(f"weights are {weights}; none may be negative, infinite or NaN")
    if abs(sum(weights) - 1) > 1e-4:
        raise InputError(f"weights sum to {sum(weights):.6g}; they must sum to 1")
    return weights


@dataclass(frozen=True)
class FusedStep:
    """What a fusion step gives for B rows."""

    logits: torch.Tensor  # [B, V_main], the main model's new logits
    chosen: torch.Tensor  # int32 [B], their argmax
    main_choice: torch.Tensor  # int32 [B], the argmax of the main model's own logits
    status: tuple[tuple[str, torch.Tensor], ...] = ()  # of each member that took part: name, int32 [B]

    def check(self) -> None:
        """Raise InputError where a member's row has no softmax. On CUDA this waits for the device."""
        for name, status in self.status:
            check_status(name, status.tolist())

    def read(self, tokens: torch.Tensor) -> tuple[list[int], list[int]]:
        """The sampled tokens (an integer dtype, [B]) and the main model's own choices, on the host.

        With what `check` looks at this is one copy from the device, the only one of a step.

        Raises:
            InputError: see `check`.
        """
        if tokens.device.type == "cpu":  # the top-k operation has looked at the status
            return tokens.tolist(), self.main_choice.tolist()
        parts = [tokens.int(), self.main_choice, *(status for _, status in self.status)]
        chosen, main, *codes = torch.stack(parts).tolist()
        for (name, _), code in zip(self.status, codes, strict=True):
            check_status(name, code)
        return chosen, main


class Fuser:
    """Fusion steps with fixed settings; see `fuse_logits` for the mathematics.

    A token whose probability is below `min_probability` is not worth its row: it counts as part of its
    member's tail, and is no candidate. Whether a row happens to be known already never matters, so results do
    not depend on what is cached.

    On CUDA a step is launches alone: it never waits for the device, reads nothing back, and after a first
    step copies nothing there, so that a CUDA graph can capture it. Missing rows are all computed by the first
    step (or before, by `RelativeMap.fill`).
    """

    def __init__(
        self,
        maps: Sequence[RelativeMap],
        *,
        learning_rate: float,
        steps: int = 5,
        candidates: int = 128,
        min_probability: float = 0.0,
        names: Sequence[str] | None = None,
    ) -> None:
        """Check the settings; `names` are the members' for error messages.

        Raises:
            InputError: a setting out of range, or maps that do not fit together.
        """
        if not maps:
            raise InputError("there are no relative maps; give one for each member, the main model's first")
        if not math.isfinite(learning_rate) or not 0 < learning_rate <= 10:
            raise InputError(
                f"learning_rate is {learning_rate}; choose above 0 to 10 (the paper uses 0.1 to 0.5)"
            )
        if not 1 <= steps <= 64:
            raise InputError(f"steps is {steps}; choose 1 to 64")
        if candidates < 1:
            raise InputError(f"candidates is {candidates}; choose 1 or more")
        if not 0 <= min_probability < 1:
            raise InputError(f"min_probability is {min_probability}; choose 0 to below 1")
        anchors = {one.anchors for one in maps}
        if len(anchors) > 1:
            raise InputError(f"the relative maps have {sorted(anchors)} anchors; all must have the same ones")
        devices = {str(one.device) for one in maps}
        if len(devices) > 1:
            raise InputError(
                f"the relative maps are on {' and '.join(sorted(devices))}; "
                "move them to one device with .to()"
            )
        self.maps = list(maps)
        self.learning_rate = learning_rate
        self.steps = steps
        self.candidates = candidates
        self.min_probability = min_probability
        self.names = list(names) if names is not None else [f"member {i}" for i in range(len(maps))]
        self._shares: dict[tuple[object, ...], torch.Tensor] = {}

    def step(self, logits: Sequence[torch.Tensor | None], weights: Sequence[float]) -> FusedStep:
        """Fuse B rows.

        Args:
            logits: of each member, the main model first, [B, V_i]. None: the member sits out, and the others'
                weights are scaled to sum to 1.
            weights: one for each member, as `check_weights` gives them.

        Raises:
            InputError: see `fuse_logits`.
        """
        if len(logits) != len(self.maps):
            raise InputError(
                f"there are {len(logits)} logits for {len(self.maps)} relative maps; give one for each"
            )
        if logits[0] is None:
            raise InputError("the main model cannot sit out of a fusion step")
        present = [i for i, one in enumerate(logits) if one is not None]
        total = sum(weights[i] for i in present)
        members = [self._member(i, logits[i], logits[0]) for i in present]
        main_choice = members[0].topk.ids[:, 0]
        status = tuple(
            (f"logits of {self.names[i]}", member.topk.status)
            for i, member in zip(present, members, strict=True)
        )
        if len(present) == 1 < len(logits) or total == 0:
            return FusedStep(logits[0], main_choice, main_choice, status)
        # A plain copy: logits made under inference_mode could not be written to outside it.
        fused = torch.empty_like(logits[0], requires_grad=False)
        with torch.no_grad():
            fused.copy_(logits[0])
        _, chosen = ops.fuse(
            fused,
            members,
            self._share([weights[i] / total for i in present], fused),
            learning_rate=self.learning_rate,
            steps=self.steps,
            min_probability=self.min_probability,
        )
        return FusedStep(fused, chosen, main_choice, status)

    def _share(self, weights: list[float], logits: torch.Tensor) -> torch.Tensor:
        """The weights for each row, float32 [B, n], where the logits are; made once, since a copy to a device
        waits for it. A CUDA graph of the step reads this tensor: it must not outlive the Fuser."""
        key = (*weights, len(logits), logits.device)
        found = self._shares.get(key)
        if found is None:
            if len(self._shares) >= _SHARES_KEPT:
                self._shares.clear()
            found = torch.tensor([weights], dtype=torch.float32).repeat(len(logits), 1).to(logits.device)
            self._shares[key] = found
        return found

    def _member(self, i: int, logits: torch.Tensor | None, main: torch.Tensor) -> ops.FuseInput:
        assert logits is not None
        relative = self.maps[i]
        name = f"logits of {self.names[i]}"
        if logits.dim() != 2 or logits.shape[0] != main.shape[0] or logits.shape[1] != relative.vocab_size:
            raise InputError(
                f"{name} have shape {list(logits.shape)}; expected [{main.shape[0]}, {relative.vocab_size}], "
                "as many tokens as its relative map has"
            )
        topk = ops.topk_softmax(logits, min(self.candidates, relative.vocab_size), name=name)
        if relative.device.type == "cuda":
            relative.fill()
        if relative.is_complete:
            return ops.FuseInput(topk, relative.rows)
        # The most probable token always counts (the fuse operation keeps at least one).
        needed = topk.probs >= self.min_probability
        needed[:, 0] = True
        relative.ensure(topk.ids[needed])
        return ops.FuseInput(topk, relative.rows)
