"""One fusion step: members' logits in, the main model's new logits out."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepen_ext import ops
from deepen_ext.errors import InputError
from deepen_ext.ops.topk_softmax import TopK, check_status, launch
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
class Part:
    """One member's part of a step: what it says, and of which rows."""

    member: int
    name: str
    topk: TopK  # [n, k], on the fusing device
    rows: Sequence[int]  # n rows of the step


@dataclass(frozen=True)
class FusedStep:
    """What a fusion step gives for B rows."""

    logits: torch.Tensor  # [B, V_main], the main model's new logits
    chosen: torch.Tensor  # int32 [B], their argmax
    main_choice: torch.Tensor  # int32 [B], the argmax of the main model's own logits
    parts: tuple[Part, ...] = ()  # of each member that took part, the main model first

    def check(self) -> None:
        """Raise InputError where a member's row has no softmax. On CUDA this waits for the device."""
        for part in self.parts:
            check_status(part.name, part.topk.status.tolist(), part.rows)

    def read(self, tokens: torch.Tensor) -> tuple[list[int], list[int]]:
        """The sampled tokens (an integer dtype, [B]) and the main model's own choices, on the host.

        With what `check` looks at this is one copy from the device, the only one of a step.

        Raises:
            InputError: see `check`.
        """
        if tokens.device.type == "cpu":  # `Fuser.top` has looked at the status
            return tokens.tolist(), self.main_choice.tolist()
        read = torch.cat(
            [tokens.int(), self.main_choice, *(part.topk.status for part in self.parts)]
        ).tolist()
        batch = len(tokens)
        start = 2 * batch
        for part in self.parts:
            check_status(part.name, read[start : start + len(part.rows)], part.rows)
            start += len(part.rows)
        return read[:batch], read[batch : 2 * batch]


class Fuser:
    """Fusion steps with fixed settings; see `fuse_logits` for the mathematics.

    A token whose probability is below `min_probability` is not worth its row: it counts as part of its
    member's tail, and is no candidate. Whether a row happens to be known already never matters, so results do
    not depend on what is cached.

    Members' logits may be on any devices: each top-k is taken where the logits are, and only its k ids and
    probabilities go to the device of the maps, which is the main model's.

    On CUDA a step is launches alone: it never waits for the device, reads nothing back, and after a first
    step copies nothing there, so that a CUDA graph can capture it. Missing rows are all computed by the first
    step (or before, by `RelativeMap.fill`). Threads may share a Fuser.
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
        self._shares: dict[object, torch.Tensor] = {}
        self._lock = threading.Lock()  # of the maps and the shares

    @property
    def device(self) -> torch.device:
        """Where the maps are."""
        return self.maps[0].device

    def top(self, member: int, logits: torch.Tensor, rows: Sequence[int] | None = None) -> Part:
        """A member's most probable tokens, on the fusing device.

        Args:
            member: its place, 0 for the main model.
            logits: [n, V_i], on any device.
            rows: which rows of the step they are; None for the first n.

        Raises:
            InputError: a shape that does not fit its map, or (on the CPU) a row that has no softmax.
        """
        relative = self.maps[member]
        name = f"logits of {self.names[member]}"
        rows = range(len(logits)) if rows is None else rows
        if logits.dim() != 2 or logits.shape[0] != len(rows) or logits.shape[1] != relative.vocab_size:
            raise InputError(
                f"{name} have shape {list(logits.shape)}; expected [{len(rows)}, {relative.vocab_size}], "
                "as many tokens as its relative map has"
            )
        topk = launch(logits, min(self.candidates, relative.vocab_size), name=name)
        if topk.status.device != self.device:
            topk = TopK(*(one.to(self.device) for one in topk))
        if self.device.type == "cpu":
            check_status(name, topk.status.tolist(), rows)
        return Part(member, name, topk, rows)

    def step(
        self,
        logits: Sequence[torch.Tensor | None],
        weights: Sequence[float],
        *,
        rows: Sequence[Sequence[int] | None] | None = None,
        main: Part | None = None,
    ) -> FusedStep:
        """Fuse B rows.

        Args:
            logits: of each member, the main model first, [B, V_i]. None: the member sits out, and the others'
                weights are scaled to sum to 1. A row without assistants keeps the main model's logits.
            weights: one for each member, as `check_weights` gives them.
            rows: where an assistant speaks for some of the B rows only: which ones its logits [n_i, V_i] are
                of, in rising order; None for all of them.
            main: what `top` gave for the main model's logits, where it is known already.

        Raises:
            InputError: see `fuse_logits`.
        """
        if len(logits) != len(self.maps):
            raise InputError(
                f"there are {len(logits)} logits for {len(self.maps)} relative maps; give one for each"
            )
        main_logits = logits[0]
        if main_logits is None:
            raise InputError("the main model cannot sit out of a fusion step")
        with self._lock:
            parts = [main if main is not None else self.top(0, main_logits)]
            every = range(len(main_logits))
            for i, one in enumerate(logits[1:], start=1):
                if one is not None:
                    given = every if rows is None else rows[i]
                    parts.append(self.top(i, one, every if given is None else given))
            return self._fuse(main_logits, parts, weights)

    def _fuse(self, logits: torch.Tensor, parts: list[Part], weights: Sequence[float]) -> FusedStep:
        main_choice = parts[0].topk.ids[:, 0]
        shares = self._shares_by_row(len(logits), parts, weights)
        fused_rows = [row for row, own in enumerate(shares) if own]
        if not fused_rows:
            return FusedStep(logits, main_choice, main_choice, tuple(parts))
        whole = len(fused_rows) == len(logits)
        # A plain copy: logits made under inference_mode could not be written to outside it.
        fused = torch.empty_like(logits, requires_grad=False)
        with torch.no_grad():
            fused.copy_(logits)
        ours = fused if whole else fused[self._index(fused_rows)]
        _, chosen = ops.fuse(
            ours,
            [self._input(part, fused_rows) for part in parts],
            self._share(tuple(shares[row] for row in fused_rows)),
            learning_rate=self.learning_rate,
            steps=self.steps,
            min_probability=self.min_probability,
        )
        if not whole:
            there = self._index(fused_rows)
            fused[there] = ours
            chosen = main_choice.index_copy(0, there, chosen)
        return FusedStep(fused, chosen, main_choice, tuple(parts))

    def _shares_by_row(
        self, batch: int, parts: list[Part], weights: Sequence[float]
    ) -> list[tuple[float, ...]]:
        """Each row's weights, one for each part and summing to 1; () for a row without an assistant."""
        alone = len(self.maps) == 1
        if all(len(part.rows) == batch for part in parts):  # the usual case: the same for all
            own = tuple(weights[part.member] for part in parts)
            return [_scaled(own, alone)] * batch
        takes_part = [set(part.rows) for part in parts]
        return [
            _scaled(
                tuple(
                    weights[part.member] if row in rows else 0.0
                    for part, rows in zip(parts, takes_part, strict=True)
                ),
                alone,
            )
            for row in range(batch)
        ]

    def _share(self, weights: tuple[tuple[float, ...], ...]) -> torch.Tensor:
        """The weights float32 [B, n], where the maps are; kept, since a copy to a device waits for it.

        A CUDA graph of the step reads this tensor: it must not outlive the Fuser."""
        found = self._shares.get(weights)
        if found is None:
            if len(self._shares) >= _SHARES_KEPT:
                self._shares.clear()
            found = torch.tensor(weights, dtype=torch.float32).to(self.device)
            self._shares[weights] = found
        return found

    def _index(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long).to(self.device)

    def _input(self, part: Part, fused_rows: list[int]) -> ops.FuseInput:
        """The part's tokens in the order of the fused rows, and its map with every row they need."""
        relative, topk = self.maps[part.member], part.topk
        if relative.device.type == "cuda":
            relative.fill()
        if not relative.is_complete:
            # The most probable token always counts (the fuse operation keeps at least one).
            needed = topk.probs >= self.min_probability
            needed[:, 0] = True
            relative.ensure(topk.ids[needed])
        if list(part.rows) != fused_rows:
            topk = self._placed(part, fused_rows)
        return ops.FuseInput(topk, relative.rows)

    def _placed(self, part: Part, fused_rows: list[int]) -> TopK:
        """The part's tokens in the places of its rows; elsewhere its weight is 0, and nothing is read."""
        place = {row: i for i, row in enumerate(fused_rows)}
        source = [i for i, row in enumerate(part.rows) if row in place]
        there = self._index([place[part.rows[i]] for i in source])
        chosen = self._index(source)
        return TopK(
            *(
                one.new_zeros(len(fused_rows), *one.shape[1:]).index_copy_(0, there, one[chosen])
                for one in part.topk
            )
        )


def _scaled(weights: tuple[float, ...], alone: bool) -> tuple[float, ...]:
    total = sum(weights)
    if total == 0 or (not alone and not any(weights[1:])):
        return ()
    return tuple(weight / total for weight in weights)
