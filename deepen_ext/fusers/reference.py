"""DeePEn as the paper writes it, in plain torch with autograd: the oracle of every test, not made to be fast.

Huang et al., "Ensemble Learning for Heterogeneous Large Language Models with Deep Parallel Collaboration",
NeurIPS 2024 (arXiv 2404.12715).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


def relative_matrix(
    embedding: torch.Tensor, anchor_ids: torch.Tensor, temperature: float = 100.0
) -> torch.Tensor:
    """The relative matrix R of one member (section 3.2).

    `R[t] = softmax(temperature * c_t / ||c_t||_2)` with `c_t[a] = cos(E[t], E[anchor a])`.

    Args:
        embedding: E, float [V, d], the input embeddings.
        anchor_ids: int64 [A], the anchors' token ids.
        temperature: 100 in the authors' code.

    Returns:
        [V, A] of the embedding's dtype; rows sum to 1.
    """
    # One anchor at a time, as the authors do: a matrix product rounds differently, and where the rows come
    # out nearly uniform that alone moves the fused logits by 1e-4.
    columns = [
        functional.cosine_similarity(embedding, embedding[anchor : anchor + 1])
        for anchor in anchor_ids.tolist()
    ]
    cosines = torch.stack(columns, dim=1)
    return torch.softmax(temperature * functional.normalize(cosines, dim=1), dim=1)


def aggregate(
    logits: Sequence[torch.Tensor], relative: Sequence[torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """The average of all members in relative space, `sum_i w_i softmax(logits_i) R_i` -> [B, A] (section
    3.3)."""
    parts = [
        weight * (torch.softmax(one, dim=-1) @ matrix)
        for one, matrix, weight in zip(logits, relative, weights, strict=True)
    ]
    return torch.stack(parts).sum(dim=0)


def inverse_search(
    logits: torch.Tensor,
    relative: torch.Tensor,
    target: torch.Tensor,
    *,
    learning_rate: float,
    steps: int = 5,
    fixed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Main-model logits whose relative representation nears the target (section 3.4).

    `steps` steps of AdamW (torch's defaults, weight decay 0.01) on `KL(target || softmax(z) R) / A`, with the
    learning rate under cosine annealing (T_max 10, down to a quarter). Rows of a batch are independent.

    Args:
        logits: [B, V], where the search starts.
        relative: [V, A].
        target: [B, A].
        learning_rate: the first step's.
        steps: how many.
        fixed: bool [B, V], logits that take part in the softmax but do not move.
    """
    found = torch.empty_like(logits)
    for row in range(logits.shape[0]):
        moving = torch.ones_like(logits[row], dtype=torch.bool) if fixed is None else ~fixed[row]
        moved = logits[row, moving].clone().requires_grad_()
        optimiser = torch.optim.AdamW([moved], lr=learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=10, eta_min=learning_rate / 4)
        for _ in range(steps):
            optimiser.zero_grad()
            whole = logits[row].masked_scatter(moving, moved)
            ours = torch.log(torch.softmax(whole, dim=-1) @ relative)
            loss = functional.kl_div(ours, target[row], reduction="sum") / target.shape[1]
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        found[row] = logits[row].masked_scatter(moving, moved.detach())
    return found


def fuse_logits(
    logits: Sequence[torch.Tensor],
    relative: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    learning_rate: float,
    steps: int = 5,
) -> torch.Tensor:
    """One fusion step of the paper's recipe.

    Args:
        logits: of each member, the main model first, [B, V_i].
        relative: their relative matrices, [V_i, A].
        weights: lambda_i, summing to 1.
        learning_rate: eta of the inverse search, 0.1 to 0.5 in the paper.
        steps: T of the inverse search.

    Returns:
        [B, V_main], the main model's new logits.
    """
    with torch.no_grad():
        target = aggregate(logits, relative, weights)
    return inverse_search(logits[0], relative[0], target, learning_rate=learning_rate, steps=steps)
