"""A member's way into relative space: a relative row for each token, kept once it is computed.

On the CPU a row is computed when a token first needs it. On CUDA nothing may ask the device which rows a step
needs, so the whole map is filled before the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ops import Rows
from deepen_ext.ops.checks import token_id_tensor
from deepen_ext.space.map_file import MapFacts, read_map, write_map
from deepen_ext.space.row_sources import DEFAULT_ENTRIES, RowSource, SimilarityRows, SparseRows

_FILL_BLOCK = 4096  # rows computed together by `fill`: what a block needs beside the map stays small


class RelativeMap:
    """Relative rows of one member, by token id, on one device.

    Memory is reserved for the whole vocabulary; on the CPU it is taken page by page as rows are computed. A
    map without a source (`from_dense`, or `load` without an embedding) has the rows it has.
    """

    def __init__(
        self,
        vocab_size: int,
        anchors: int,
        entries: int,
        source: RowSource | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.source = source
        # Of similarity rows, also where a file gave them without their source.
        self.recipe = source.recipe if isinstance(source, SimilarityRows) else None
        self.rows_computed = 0  # by this object, since it was made
        self._known = torch.zeros(vocab_size, dtype=torch.bool)  # always on the host
        self._complete = False  # may be False although every row is known: nobody has looked yet
        self.rows = Rows(
            columns=torch.empty(vocab_size, entries, dtype=torch.int32, device=device),
            values=torch.empty(vocab_size, entries, dtype=torch.float32, device=device),
            rest=torch.empty(vocab_size, dtype=torch.float32, device=device),
            anchors=anchors,
        )

    @classmethod
    def from_source(cls, source: RowSource, device: str | torch.device | None = None) -> RelativeMap:
        """An empty map, whose rows come from the source as they are needed; None: where the source is."""
        where = source.device if device is None else device
        return cls(source.vocab_size, source.anchors, source.entries, source, where)

    @classmethod
    def from_embedding(
        cls,
        embedding: torch.Tensor,
        anchor_ids: torch.Tensor,
        recipe: Literal["calibrated", "paper"] = "calibrated",
        temperature: float | None = None,
        entries: int = DEFAULT_ENTRIES,
    ) -> RelativeMap:
        """Similarity rows for every token, on demand (DeePEn, section 3.2; see `SimilarityRows`).

        Args:
            embedding: input embeddings, float32, float16 or bfloat16 [V, d]; kept, not copied. The map is on
                its device.
            anchor_ids: int64 [A], this member's token for each anchor, same order in all members.
            recipe: "calibrated", or "paper" to the letter.
            temperature: None for the recipe's own (40; paper: 100).
            entries: m, how many of a row's largest entries are kept; the others share the rest evenly.

        Raises:
            InputError: a setting out of range.
        """
        source = SimilarityRows(
            embedding, anchor_ids, recipe=recipe, temperature=temperature, entries=entries
        )
        return cls.from_source(source)

    @classmethod
    def from_dense(cls, matrix: torch.Tensor) -> RelativeMap:
        """A map of full rows.

        Args:
            matrix: float32 [V, A], rows sum to 1; kept, not copied. The map is on its device.

        Raises:
            InputError: not two-dimensional, not float32, negative or not finite, or rows whose sum is not 1.
        """
        if matrix.dim() != 2 or 0 in matrix.shape:
            raise InputError(
                f"the relative matrix has shape {list(matrix.shape)}; expected [vocabulary, anchors]"
            )
        if matrix.dtype != torch.float32:
            raise InputError(f"the relative matrix is {matrix.dtype}; pass matrix.float()")
        if not bool(torch.isfinite(matrix).all()) or bool((matrix < 0).any()):
            raise InputError(
                "the relative matrix has negative or non-finite entries; rows must be distributions"
            )
        off = (matrix.sum(dim=1, dtype=torch.float64) - 1).abs().max().item()
        if off > 1e-3:
            raise InputError(f"rows of the relative matrix must sum to 1; one is off by {off:.3g}")
        vocab, anchors = matrix.shape
        whole = cls(vocab, anchors, 0)
        whole.rows = Rows(None, matrix.detach().contiguous(), None, anchors)
        whole._known.fill_(True)
        whole._complete = True
        return whole

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return len(self._known)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.values.device

    @property
    def anchors(self) -> int:
        """A, the number of anchors."""
        return self.rows.anchors

    @property
    def is_dense(self) -> bool:
        """Whether rows are kept whole."""
        return self.rows.columns is None

    @property
    def is_complete(self) -> bool:
        """Whether every row is known for sure: the map is dense, or was filled."""
        return self._complete

    @property
    def rows_known(self) -> int:
        """How many tokens have their row."""
        return int(self._known.sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what the rows are computed from (a second for a large embedding); "" without source."""
        return "" if self.source is None else self.source.fingerprint()

    def ensure(self, ids: torch.Tensor) -> int:
        """Compute the rows these tokens (any integer dtype and shape) still lack; returns how many that were.

        Ids on a CUDA device are copied to the host, which waits for them, unless the map was filled.

        Raises:
            InputError: ids that are no whole numbers, or a row is missing and the map has no source to
                compute it from.
        """
        if self._complete:
            return 0
        flat = token_id_tensor("ids", ids).reshape(-1).long().cpu()
        missing = flat[~self._known[flat]]
        if len(missing) == 0:
            return 0
        missing = missing.unique()  # type: ignore[no-untyped-call]
        self._compute(missing)
        return len(missing)

    def fill(self) -> int:
        """Compute every row that is still missing, some thousands at a time; returns how many that were.

        Raises:
            InputError: rows are missing and the map has no source to compute them from.
        """
        if self._complete:
            return 0
        missing = torch.nonzero(~self._known).flatten()
        for tokens in torch.split(missing, _FILL_BLOCK) if len(missing) else ():
            self._compute(tokens)
        self._complete = True
        return len(missing)

    def _compute(self, missing: torch.Tensor) -> None:
        """Compute these rows (int64 [N] on the host, all different, N at least 1) and keep them."""
        if self.source is None:
            raise InputError(
                f"the relative map has no row for token {int(missing[0])} and no embedding to compute it "
                "from; load it with RelativeMap.load(path, embedding=...)"
            )
        self._keep(missing, self.source.compute(missing))
        self.rows_computed += len(missing)

    def _keep(self, tokens: torch.Tensor, computed: SparseRows) -> None:
        assert self.rows.columns is not None
        assert self.rows.rest is not None
        there = tokens.to(self.device)
        self.rows.columns[there] = computed.columns.to(self.device)
        self.rows.values[there] = computed.values.to(self.device)
        self.rows.rest[there] = computed.rest.to(self.device)
        self._known[tokens] = True

    def to(self, device: str | torch.device) -> RelativeMap:
        """This map's rows on another device; itself if they are there. Missing rows have the same source."""
        rows = self.rows
        moved = rows.values.to(device)
        if moved.device == self.device:
            return self
        copy = RelativeMap(self.vocab_size, self.anchors, 0, self.source, device)
        copy.rows = Rows(
            columns=None if rows.columns is None else rows.columns.to(device),
            values=moved,
            rest=None if rows.rest is None else rows.rest.to(device),
            anchors=self.anchors,
        )
        copy.recipe = self.recipe
        copy._known = self._known.clone()
        copy._complete = self._complete
        return copy

    def to_dense(self) -> torch.Tensor:
        """All rows, whole: float32 [V, A]. For small vocabularies and tests; computes what is missing."""
        if self.rows.columns is None or self.rows.rest is None:
            return self.rows.values
        self.fill()
        used = self.rows.columns >= 0
        length = used.sum(dim=1)
        share = torch.where(length < self.anchors, self.rows.rest / (self.anchors - length).clamp(min=1), 0.0)
        dense = share[:, None].repeat(1, self.anchors)
        token, entry = torch.nonzero(used, as_tuple=True)
        dense[token, self.rows.columns[token, entry].long()] = self.rows.values[token, entry]
        return dense

    def save(self, path: str | Path) -> None:
        """Write the rows computed so far to a safetensors file in one step: no reader sees half of it.

        The file does not say on which device they were: rows on CUDA are copied to the host first.
        """
        if self.rows.columns is None or self.rows.rest is None:
            tensors = {"matrix": self.rows.values.cpu()}
        else:
            tokens = torch.nonzero(self._known).flatten()
            there = tokens.to(self.device)
            tensors = {
                "tokens": tokens.int(),
                "columns": self.rows.columns[there].cpu(),
                "values": self.rows.values[there].cpu(),
                "rest": self.rows.rest[there].cpu(),
            }
        similarity = self.source if isinstance(self.source, SimilarityRows) else None
        facts = MapFacts(
            vocab_size=self.vocab_size,
            anchors=self.anchors,
            entries=self.rows.values.shape[1],
            source=self.fingerprint,
            recipe=similarity.recipe if similarity else None,
            temperature=similarity.temperature if similarity else None,
        )
        write_map(Path(path), facts, tensors)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        embedding: torch.Tensor | None = None,
        anchor_ids: torch.Tensor | None = None,
        device: str | torch.device | None = None,
    ) -> RelativeMap:
        """Read a saved map.

        Args:
            path: what `save` wrote.
            embedding: with `anchor_ids`, lets the map compute rows it was saved without.
            anchor_ids: see `from_embedding`.
            device: where the rows go; None for the embedding's device, or the CPU without one.

        Raises:
            InputError: no such file; only one of `embedding` and `anchor_ids`; the map was saved for another
                model, other anchors or other settings.
            ModelError: the file is damaged or no relative map.
        """
        if (embedding is None) != (anchor_ids is None):
            raise InputError("give both embedding and anchor_ids, or neither")
        facts, tensors = read_map(Path(path))
        if device is None:
            device = "cpu" if embedding is None else embedding.device
        if "matrix" in tensors:
            return cls.from_dense(tensors["matrix"].to(device))
        source = None
        if embedding is not None and anchor_ids is not None:
            if facts.recipe is None:
                raise InputError(
                    f"{path} holds rows that need tokenizers, not an embedding alone; load it without"
                )
            source = SimilarityRows(
                embedding,
                anchor_ids,
                recipe=facts.recipe,
                temperature=facts.temperature,
                entries=facts.entries,
            )
            _check_source(facts, source, source.fingerprint(), path)
        try:
            loaded = cls(facts.vocab_size, facts.anchors, facts.entries, source, device)
        except RuntimeError as error:
            raise ModelError(
                f"{path}: there is no memory for {facts.vocab_size} rows of {facts.entries} entries"
            ) from error
        loaded.recipe = facts.recipe
        if source is not None:
            loaded.fingerprint = facts.source  # they were compared
        loaded._adopt(tensors)
        return loaded

    def read(self, path: str | Path) -> int:
        """Take over the rows another run saved for the same source; returns how many.

        Raises:
            InputError: no such file, or saved for another source; this map has no source.
            ModelError: the file is damaged or no relative map.
        """
        facts, tensors = read_map(Path(path))
        if self.source is None:
            raise InputError("this map has no source, so no other run's rows are known to be its own")
        _check_source(facts, self.source, self.fingerprint, path)
        if "tokens" not in tensors:
            raise ModelError(f"the relative map {path} is damaged (its rows are whole); delete it")
        self._adopt(tensors)
        return len(tensors["tokens"])

    def _adopt(self, tensors: Mapping[str, torch.Tensor]) -> None:
        rows = SparseRows(tensors["columns"], tensors["values"], tensors["rest"])
        self._keep(tensors["tokens"].long(), rows)


def _check_source(facts: MapFacts, source: RowSource, fingerprint: str, path: str | Path) -> None:
    """That the rows were saved for this source: by its fingerprint, and by the sizes that index them."""
    if facts.source != fingerprint:
        raise InputError(
            f"{path} was saved for another model, other anchors or other settings; delete it or use what "
            "it was made with"
        )
    sizes = (facts.vocab_size, facts.anchors, facts.entries)
    if sizes != (expected := (source.vocab_size, source.anchors, source.entries)):
        raise ModelError(
            f"the relative map {path} is damaged (vocab_size, anchors, entries are {sizes}, those of its "
            f"source {expected}); delete it"
        )
