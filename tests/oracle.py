"""The operations' mathematics in float64, on whole rows: what a kernel's result is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepen_ext.fusers import reference


def random_embedding(vocab: int, dim: int, seed: int, *, shared: float = 0.6) -> torch.Tensor:
    """Embeddings like real ones: a common direction (mean cosine well above 0), norms that vary, some
    outliers."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(vocab, dim, generator=generator) + shared * torch.randn(dim, generator=generator)
    rows *= torch.rand(vocab, 1, generator=generator) + 0.2
    rows[:: max(vocab // 7, 1)] *= 5
    return rows


def random_logits(batch: int, vocab: int, seed: int) -> torch.Tensor:
    """Logits like real ones: a broad bulk, a few that stand out, near ties at the top."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, vocab, generator=generator)
    top = torch.randint(vocab, (batch, 6), generator=generator)
    heights = torch.tensor([9.0, 8.999, 8.5, 7.0, 6.0, 5.0]).expand(batch, -1)
    return logits.scatter(1, top, heights)


def similarity_rows(
    embedding: torch.Tensor,
    anchor_ids: torch.Tensor,
    *,
    recipe: str,
    temperature: float,
    tokens: torch.Tensor | slice = slice(None),
) -> torch.Tensor:
    """[V, A] in float64: the recipe's whole rows; with `tokens` [N, A], theirs alone."""
    rows = embedding.double()
    if recipe == "calibrated":
        rows = rows - rows[anchor_ids].mean(dim=0)
    rows = torch.nn.functional.normalize(rows, dim=1)
    cosines = rows[tokens] @ rows[anchor_ids].T
    if recipe == "paper":
        cosines = torch.nn.functional.normalize(cosines, dim=1)
    return torch.softmax(temperature * cosines, dim=1)


def keep_entries(rows: torch.Tensor, entries: int) -> torch.Tensor:
    """The rows with all but their largest entries replaced by an even share of what those leave."""
    anchors = rows.shape[1]
    top = rows.topk(entries, dim=1)
    rest = 1 - top.values.sum(dim=1, keepdim=True)
    share = rest / (anchors - entries) if entries < anchors else torch.zeros_like(rest)
    return share.expand(-1, anchors).scatter(1, top.indices, top.values)


def fuse(
    logits: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    learning_rate: float,
    steps: int,
    candidates: int,
    min_probability: float = 0.0,
    log_probs: bool = True,
) -> torch.Tensor:
    """[B, V_main] in float64: a fusion step whose less probable tokens have uniform rows and do not move."""
    logits = [one.double() for one in logits]
    mass = logits[0].logsumexp(dim=1, keepdim=True) * log_probs
    rows = [one.double() for one in rows]
    fused = []
    for b in range(len(logits[0])):
        kept = [_kept(one[b], candidates, min_probability) for one in logits]
        mapped = [
            torch.where(keep[:, None], row, 1 / row.shape[1]) for keep, row in zip(kept, rows, strict=True)
        ]
        target = reference.aggregate([one[b : b + 1] for one in logits], mapped, weights)
        fused.append(
            reference.inverse_search(
                logits[0][b : b + 1] - mass[b],
                mapped[0],
                target,
                learning_rate=learning_rate,
                steps=steps,
                fixed=~kept[0][None],
            )
        )
    return torch.cat(fused) + mass


def _kept(logits: torch.Tensor, candidates: int, min_probability: float) -> torch.Tensor:
    probs = torch.softmax(logits, dim=0)
    order = torch.sort(probs, descending=True, stable=True).indices[:candidates]
    kept = torch.zeros_like(probs, dtype=torch.bool)
    kept[order] = probs[order] >= min_probability
    kept[order[0]] = True
    return kept
