"""A member's way into relative space: a relative row for each token, kept once it is computed.

On the CPU a relative row is computed when a token first needs it. On CUDA nothing may ask the device which
ones a step needs, so the whole map is filled before the first step.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ops import RelativeRows
from deepen_ext.ops.checks import token_id_tensor
from deepen_ext.space.map_file import MapFacts, check_source, read_map, write_map
from deepen_ext.space.recipes import DEFAULT_ENTRIES, SimilarityRecipe
from deepen_ext.space.row_sources import RowSource, SimilarityRows
from deepen_ext.space.row_table import RowTable

_FILL_BLOCK = 4096  # relative rows computed together by `fill`: what a block needs beside the map stays small


class RelativeMap:
    """Relative rows of one member, by token id, on one device, and the source of those not computed yet.

    A map without a source (`from_dense`, or `load` without an embedding) has the relative rows it has.
    """

    def __init__(self, table: RowTable, source: RowSource | None = None) -> None:
        self.table = table
        self.source = source
        # Of similarity rows, also where a file gave them without their source.
        self.recipe = source.recipe if isinstance(source, SimilarityRows) else None
        self.rows_computed = 0  # by this object, since it was made
        self._complete = table.rows.columns is None  # may be False although every row is known

    @classmethod
    def from_source(cls, source: RowSource, device: str | torch.device | None = None) -> RelativeMap:
        """An empty map on a device (None: where the source is); the source computes what is needed."""
        where = source.device if device is None else device
        return cls(RowTable.empty(source.vocab_size, source.anchors, source.entries, where), source)

    @classmethod
    def from_embedding(
        cls,
        embedding: torch.Tensor,
        anchor_ids: torch.Tensor,
        recipe: SimilarityRecipe = "calibrated",
        temperature: float | None = None,
        entries: int = DEFAULT_ENTRIES,
    ) -> RelativeMap:
        """Similarity rows for every token, on demand (DeePEn, section 3.2; see `SimilarityRows`).

        Args:
            embedding: input embeddings, float32, float16 or bfloat16 [V, d]; kept, not copied. The map is on
                its device.
            anchor_ids: int64 [A], this member's token for each anchor, same order in all members.
            recipe: "calibrated", or "paper" for the paper's formula.
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
        """A map of full relative rows.

        Args:
            matrix: float32 [V, A], rows sum to 1; kept, not copied. The map is on its device.

        Raises:
            InputError: not two-dimensional, not float32, negative or not finite, or rows whose sum is not 1.
        """
        return cls(RowTable.dense(matrix))

    @property
    def rows(self) -> RelativeRows:
        """The relative rows, as the operations take them; those not known yet are not initialised."""
        return self.table.rows

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return len(self.table.known)

    @property
    def device(self) -> torch.device:
        """Where the relative rows are."""
        return self.table.device

    @property
    def anchors(self) -> int:
        """A, the number of anchors."""
        return self.rows.anchors

    @property
    def is_dense(self) -> bool:
        """Whether relative rows are kept whole."""
        return self.rows.columns is None

    @property
    def is_complete(self) -> bool:
        """Whether every relative row is known for sure: the map is dense, or was filled."""
        return self._complete

    @property
    def rows_known(self) -> int:
        """How many tokens have their relative row."""
        return int(self.table.known.sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what the source computes from (a second for a large embedding); "" without source."""
        return "" if self.source is None else self.source.fingerprint()

    def ensure(self, ids: torch.Tensor) -> int:
        """Compute the relative rows these tokens (any integer dtype and shape) still lack; returns how many.

        Ids on a CUDA device are copied to the host, which waits for them, unless the map was filled.

        Raises:
            InputError: ids that are no whole numbers or outside of the vocabulary, or a row is missing and
                the map has no source to compute it from.
        """
        if self._complete:
            return 0
        flat = token_id_tensor("ids", ids).reshape(-1).long().cpu()
        if len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= self.vocab_size):
            raise InputError(f"ids lie outside the map's {self.vocab_size} tokens")
        missing = flat[~self.table.known[flat]]
        if len(missing) == 0:
            return 0
        missing = missing.unique()  # type: ignore[no-untyped-call]
        self._compute(missing)
        return len(missing)

    def fill(self) -> int:
        """Compute every relative row still missing, some thousands at a time; returns how many.

        Raises:
            InputError: rows are missing and the map has no source to compute them from.
        """
        if self._complete:
            return 0
        missing = torch.nonzero(~self.table.known).flatten()
        for tokens in torch.split(missing, _FILL_BLOCK) if len(missing) else ():
            self._compute(tokens)
        self._complete = True
        return len(missing)

    def _compute(self, missing: torch.Tensor) -> None:
        """Compute the relative rows of these tokens (int64 [N] on the host, all different, N at least 1)."""
        if self.source is None:
            raise InputError(
                f"the relative map has no row for token {int(missing[0])} and no embedding to compute it "
                "from; load it with RelativeMap.load(path, embedding=...)"
            )
        self.table.keep(missing, self.source.compute(missing))
        self.rows_computed += len(missing)

    def to(self, device: str | torch.device) -> RelativeMap:
        """This map on another device; itself if it is there. The copy has the same source."""
        table = self.table.to(device)
        if table is self.table:
            return self
        copy = RelativeMap(table, self.source)
        copy.recipe = self.recipe
        copy._complete = self._complete
        return copy

    def to_dense(self) -> torch.Tensor:
        """All relative rows, whole: float32 [V, A]. For small vocabularies; computes what is missing."""
        self.fill()
        return self.table.to_dense()

    def save(self, path: str | Path) -> None:
        """Write the relative rows known so far to a safetensors file: no reader sees half of it.

        The file does not say on which device they were: from CUDA they are copied to the host first.
        """
        similarity = self.source if isinstance(self.source, SimilarityRows) else None
        facts = MapFacts(
            vocab_size=self.vocab_size,
            anchors=self.anchors,
            entries=self.rows.values.shape[1],
            source=self.fingerprint,
            recipe=similarity.recipe if similarity else None,
            temperature=similarity.temperature if similarity else None,
        )
        write_map(Path(path), facts, self.table.tensors())

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
            device: where the map goes; None for the embedding's device, or the CPU without one.

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
            check_source(facts, source, source.fingerprint(), path)
        try:
            table = RowTable.empty(facts.vocab_size, facts.anchors, facts.entries, device)
        except RuntimeError as error:
            raise ModelError(
                f"{path}: there is no memory for {facts.vocab_size} rows of {facts.entries} entries"
            ) from error
        table.adopt(tensors)
        loaded = cls(table, source)
        loaded.recipe = facts.recipe
        if source is not None:
            loaded.fingerprint = facts.source  # they were compared
        return loaded

    def read(self, path: str | Path) -> int:
        """Take over the relative rows another run saved for the same source; returns how many.

        Raises:
            InputError: no such file, or saved for another source; this map has no source.
            ModelError: the file is damaged or no relative map.
        """
        facts, tensors = read_map(Path(path))
        if self.source is None:
            raise InputError("this map has no source, so no other run's rows are known to be its own")
        check_source(facts, self.source, self.fingerprint, path)
        if "tokens" not in tensors:
            raise ModelError(f"the relative map {path} is damaged (its rows are whole); delete it")
        return self.table.adopt(tensors)
