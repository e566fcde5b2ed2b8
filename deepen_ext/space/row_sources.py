"""Where relative rows come from: similarity of embeddings, or the bytes a token begins with.

A source computes the relative rows of any tokens asked for; `RelativeMap` keeps them. The paper's recipe
takes `SimilarityRows` alone, the bytes recipe `PrefixRows` alone, the calibrated recipe both.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import torch

from deepen_ext import ops
from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import whole_number
from deepen_ext.ops.checks import token_id_tensor
from deepen_ext.space.anchors import Anchors, PrefixColumns
from deepen_ext.space.recipes import (
    DEFAULT_ENTRIES,
    DEFAULT_TEMPERATURES,
    SimilarityRecipe,
    check_temperature,
)

_CHUNK = 256  # embeddings looked at together, so that no copy of the whole matrix is made


class SparseRows(NamedTuple):
    """Relative rows of N tokens."""

    columns: torch.Tensor  # int32 [N, m], -1 from the first unused entry on
    values: torch.Tensor  # float32 [N, m]
    rest: torch.Tensor  # float32 [N]


class RowSource(Protocol):
    """Computes relative rows, on its device."""

    vocab_size: int
    anchors: int
    entries: int
    device: torch.device

    def compute(self, tokens: torch.Tensor) -> SparseRows:
        """Relative rows of these tokens (int64 [N], on any device)."""

    def fingerprint(self) -> str:
        """sha256 over everything the relative rows depend on."""


class SimilarityRows:
    """Relative rows by the similarity of input embeddings (DeePEn, section 3.2).

    recipe "paper": `softmax(100 c / ||c||_2)`, `c[a] = cos(E[t], E[a])`. recipe "calibrated": the anchors'
    mean is taken off first and the cosines go into the softmax as they are, `softmax(temperature * c)`.
    """

    def __init__(
        self,
        embedding: torch.Tensor,
        anchor_ids: torch.Tensor,
        *,
        recipe: SimilarityRecipe = "calibrated",
        temperature: float | None = None,
        entries: int = DEFAULT_ENTRIES,
    ) -> None:
        """Prepare the anchors' norms and mean; the embedding (float [V, d]) is neither copied nor moved.

        Raises:
            InputError: unknown recipe, temperature not above 0, entries below 1, anchor ids outside the
                embedding.
        """
        if recipe not in DEFAULT_TEMPERATURES:
            raise InputError(f"recipe '{recipe}' has no similarity rows; use 'paper' or 'calibrated'")
        if temperature is None:
            temperature = DEFAULT_TEMPERATURES[recipe]
        temperature = check_temperature("temperature", temperature)
        entries = whole_number("entries", entries, 1)
        anchor_ids = token_id_tensor("anchor_ids", anchor_ids)
        if embedding.dim() != 2:
            raise InputError(
                f"the embedding has shape {list(embedding.shape)}; expected [vocabulary, dimension]"
            )
        if anchor_ids.dim() != 1 or len(anchor_ids) == 0:
            raise InputError("there are no anchors; anchor_ids must be int64 [A] with A at least 1")
        if int(anchor_ids.min()) < 0 or int(anchor_ids.max()) >= len(embedding):
            raise InputError(f"anchor_ids lie outside the embedding's {len(embedding)} rows")
        self.recipe = recipe
        self.temperature = temperature
        self.vocab_size = len(embedding)
        self.anchors = len(anchor_ids)
        self.entries = min(entries, self.anchors)
        self.device = embedding.device
        embedding = embedding.detach()
        anchor_ids = anchor_ids.to(device=self.device, dtype=torch.int64).contiguous()
        mean = _mean(embedding, anchor_ids) if recipe == "calibrated" else None
        self.similarity = ops.Similarity(
            embedding,
            anchor_ids,
            anchor_inverse_norm=_inverse_norm(embedding, anchor_ids, mean),
            mean=mean,
            temperature=temperature,
            normalise=recipe == "paper",
            entries=self.entries,
        )

    def compute(self, tokens: torch.Tensor) -> SparseRows:
        """Relative rows of these tokens (int64 [N], on any device), where the embedding is."""
        return SparseRows(*ops.relative_rows(tokens.to(self.device), self.similarity))

    def fingerprint(self) -> str:
        """sha256 over the embedding's bytes, the anchors and the settings."""
        embedding, anchor_ids = self.similarity.embedding, self.similarity.anchor_ids
        digest = hashlib.sha256(f"{self.recipe} {self.temperature} {self.entries} ".encode())
        digest.update(f"{embedding.dtype} {list(embedding.shape)} ".encode())
        digest.update(anchor_ids.cpu().numpy().tobytes())
        for some in torch.split(embedding, _CHUNK):
            digest.update(some.contiguous().view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()


def _mean(embedding: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The mean embedding of these tokens (int64 [A]): float32 [d], summed in float64."""
    total = torch.zeros(embedding.shape[1], dtype=torch.float64, device=embedding.device)
    for some in torch.split(ids, _CHUNK):
        total += embedding[some].sum(dim=0, dtype=torch.float64)
    return (total / len(ids)).float()


def _inverse_norm(embedding: torch.Tensor, ids: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    """1 / ||E[ids] - mean||_2: float32 [A], 0 where the norm is 0."""
    norms = []
    for some in torch.split(ids, _CHUNK):
        found = embedding[some].float()
        norms.append((found if mean is None else found - mean).norm(dim=1))
    norm = torch.cat(norms)
    return torch.where(norm > 0, 1 / norm, 0.0)


class PrefixRows:
    """Relative rows by bytes: a token that is no anchor stands for the anchor its text begins with.

    With `similarity` (the calibrated recipe), anchors and tokens that begin with no anchor have their
    similarity row. Without (the bytes recipe), an anchor stands for itself alone and a token that begins with
    no anchor says nothing: its mass is spread over all anchors. EOS tokens stand for the EOS anchor in both,
    whatever their embedding.

    The bytes are looked at on the host; the relative rows come out on `device`, or where the similarity rows
    are.
    """

    def __init__(
        self,
        anchors: Anchors,
        prefixes: PrefixColumns,
        member: int,
        similarity: SimilarityRows | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self._columns = anchors.columns[member]
        self._eos_column = -2 if anchors.eos_column is None else anchors.eos_column  # -2: no token's column
        self._anchors_fingerprint = anchors.fingerprint
        self._prefixes = prefixes
        self._member = member
        self._similarity = similarity
        self.device = torch.device(device) if similarity is None else similarity.device
        self.vocab_size = len(self._columns)
        self.anchors = len(anchors)
        self.entries = 1 if similarity is None else similarity.entries

    def compute(self, tokens: torch.Tensor) -> SparseRows:
        """Relative rows of these tokens (int64 [N], on any device)."""
        tokens = tokens.cpu()
        own = self._columns[tokens]
        found = [self._prefixes.column(self._member, token) for token in tokens.tolist()]
        standing_for = torch.tensor(found, dtype=torch.int32, device="cpu")

        columns = torch.full((len(tokens), self.entries), -1, dtype=torch.int32, device=self.device)
        values = torch.zeros(len(tokens), self.entries, dtype=torch.float32, device=self.device)
        named = standing_for.to(self.device)
        columns[:, 0] = named
        values[:, 0] = (named >= 0).float()
        rest = (named < 0).float()
        if self._similarity is not None:
            by_similarity = (standing_for < 0) | ((own >= 0) & (own != self._eos_column))
            which = torch.nonzero(by_similarity).flatten()
            there = which.to(self.device)
            columns[there], values[there], rest[there] = self._similarity.compute(tokens[which])
        return SparseRows(columns, values, rest)

    def fingerprint(self) -> str:
        """sha256 over the anchors, the members' tokenizers and the similarity rows' own fingerprint."""
        similarity = "none" if self._similarity is None else self._similarity.fingerprint()
        parts = [str(self._member), self._anchors_fingerprint, self._prefixes.fingerprint, similarity]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()
