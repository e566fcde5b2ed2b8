"""One fusion step by itself: the members' logits in, the main model's new logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepen_ext.fusers import DeepenFuser
from deepen_ext.relative_map import RelativeMap
from deepen_ext.weighting import check_weights


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
            logits: `DeepenFuser.step(...).check()` tells.
    """
    fuser = DeepenFuser(maps, learning_rate=learning_rate, steps=steps, candidates=candidates)
    return fuser.step(logits, check_weights(weights, len(maps))).logits
