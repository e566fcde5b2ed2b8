"""One fusion step by itself: the members' logits in, the main model's new logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepen_ext.errors import InputError, shown
from deepen_ext.fusers.deepen import DeepenFuser
from deepen_ext.fusers.weights import check_weights
from deepen_ext.ground.numbers import whole_number
from deepen_ext.space.relative_map import RelativeMap


def fuse_logits(
    logits: Sequence[torch.Tensor],
    maps: Sequence[RelativeMap],
    weights: Sequence[float],
    *,
    learning_rate: float,
    steps: int = 5,
    candidates: int = 128,
    log_probs: bool | None = None,
) -> torch.Tensor:
    """One DeePEn step (arXiv 2404.12715, sections 3.2 to 3.4).

        r_i    = softmax(logits_i) R_i                 each member in relative space
        target = sum_i weights_i r_i                   their average
        z      = argmin_z KL(target || softmax(z) R_0)   `steps` AdamW steps from the main model's logits

    Only the `candidates` most probable tokens of a member are mapped one by one; the rest of its probability
    is spread evenly over the anchors. Only the main model's candidates move. With `candidates` at the
    vocabulary's size nothing is left out.

    Unless `log_probs` says otherwise, a constant added to the main model's logits changes nothing but that
    constant, within the precision of the logits' dtype: weight decay pulls the candidates' logits to 0 and
    leaves the others, so the search takes log-probabilities.

    Args:
        logits: of each member, the main model first; float32, float16 or bfloat16 [B, V_i], contiguous.
        maps: their relative maps, over the same anchors. Rows still missing are computed and kept.
        weights: lambda_i, not negative, summing to 1.
        learning_rate: eta of the inverse search, above 0 to 10; the paper uses 0.1 to 0.5.
        steps: T of the inverse search, 1 to 64.
        candidates: K, 1 or more.
        log_probs: whether the search runs on the main model's log-probabilities, not on its logits as they
            are. None: it does, except where the main model's map has the paper's recipe, and where every
            token is a candidate: no token is left behind then, the distribution is the same either way, and
            the new logits are the paper's.

    Returns:
        [B, V_main], in the dtype of the main model's logits; the inputs are left as they are.

    Raises:
        InputError: settings out of range; shapes, dtypes or devices that do not fit; NaN in some member's
            logits. On CUDA nothing waits for the device, so NaN raises nothing and gives that row unspecified
            logits: `DeepenFuser.step(...).check()` tells.
    """
    if not isinstance(maps, Sequence) or not all(isinstance(one, RelativeMap) for one in maps):
        raise InputError(f"maps is {shown(maps)}; give a list of relative maps, one for each member")
    if log_probs is None:
        candidates = whole_number("candidates", candidates, 1)
        log_probs = bool(maps) and candidates < maps[0].vocab_size and maps[0].recipe != "paper"
    fuser = DeepenFuser(
        maps, learning_rate=learning_rate, steps=steps, candidates=candidates, log_probs=log_probs
    )
    return fuser.step(logits, check_weights(weights, len(maps))).logits
