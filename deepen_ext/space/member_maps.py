"""The relative maps of an ensemble's members: over the anchors they share, by one recipe, kept on disk."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError

from deepen_ext.errors import DeepenError, InputError, ModelError
from deepen_ext.ground.cache_folder import cache_dir, sweep
from deepen_ext.ground.warning import warn
from deepen_ext.space.anchors import Anchors, PrefixColumns, shared_anchors
from deepen_ext.space.recipes import Recipe
from deepen_ext.space.relative_map import RelativeMap
from deepen_ext.space.row_sources import PrefixRows, RowSource, SimilarityRows

if TYPE_CHECKING:
    import torch

    from deepen_ext.members.member import Member


class MapSettings(NamedTuple):
    """How the relative rows of an ensemble are made; `cache`: kept on disk for the next run."""

    recipe: Recipe
    temperature: float | None
    entries: int
    cache: bool


class MemberMaps:
    """Anchors of some members and a relative map for each, on the main model's device.

    Relative rows of earlier runs are read from the cache folder; `save` keeps new ones there. With the main
    model on CUDA all of them are computed at once, so that no step ever waits for the device.
    """

    def __init__(self, members: Sequence[Member], settings: MapSettings) -> None:
        """Find the anchors and prepare the maps.

        Raises:
            InputError: a member without embeddings that the recipe compares, fewer than 100 shared anchors,
                or a setting out of range.
        """
        self._members = list(members)
        self._settings = settings
        embeddings = [] if settings.recipe == "bytes" else [member.embedding for member in members]
        self.anchors = shared_anchors([m.vocabulary for m in members], [m.eos_ids for m in members])
        device = members[0].device
        sources = _row_sources(members, embeddings, self.anchors, settings)
        self.maps = [RelativeMap.from_source(source, device) for source in sources]
        self._files = _map_files(self.maps) if settings.cache else []
        self._saved = [0] * len(self.maps)
        # The garbage collector may end a dropped run, which saves too, in the middle of a save.
        self._saving = threading.RLock()
        for relative, file in zip(self.maps, self._files, strict=False):
            _read_rows(relative, file)
        if device.type == "cuda":
            for relative in self.maps:
                relative.fill()
            self.save()

    def made_with(self, members: Sequence[Member], settings: MapSettings) -> bool:
        """Whether these are the maps of the same members, in the same order, by the same settings."""
        return [*map(id, members)] == [*map(id, self._members)] and settings == self._settings

    def save(self) -> None:
        """Write newly computed relative rows to the cache folder, for the next run."""
        with self._saving:
            for i, (relative, file) in enumerate(zip(self.maps, self._files, strict=False)):
                if (computed := relative.rows_computed) > self._saved[i]:
                    try:
                        relative.save(file)
                    except (OSError, SafetensorError) as error:  # the text is worth more than the rows
                        warn(f"computed rows cannot be kept in {file}: {error}")
                    self._saved[i] = computed


def _row_sources(
    members: Sequence[Member], embeddings: Sequence[torch.Tensor], anchors: Anchors, settings: MapSettings
) -> list[RowSource]:
    device = members[0].device
    recipe, temperature, entries, _ = settings
    similarity: list[SimilarityRows] = []
    if recipe != "bytes":
        for embedding, ids in zip(embeddings, anchors.token_ids, strict=True):
            # A map on CUDA is filled at once: on its own device, whatever device the member is on.
            if device.type == "cuda":
                embedding = embedding.to(device)
            similarity.append(
                SimilarityRows(embedding, ids, recipe=recipe, temperature=temperature, entries=entries)
            )
    elif temperature is not None:
        raise InputError("the bytes recipe has no temperature; leave relative_temperature out")
    if recipe == "paper":
        return list(similarity)
    prefixes = PrefixColumns(anchors, [member.vocabulary for member in members])
    return [
        PrefixRows(anchors, prefixes, i, rows, device)
        for i, rows in enumerate(similarity or [None] * len(members))
    ]


def _map_files(maps: Sequence[RelativeMap]) -> list[Path]:
    """The file of each map; [] with a warning where the cache folder cannot be made."""
    try:
        folder = cache_dir("relative-maps", "rows")
    except ModelError as error:
        warn(f"computed rows are not kept for the next run: {error}")
        return []
    sweep(folder, ".tmp??????")  # safetensors' own, of a killed process
    return [folder / f"{relative.fingerprint}.safetensors" for relative in maps]


def _read_rows(relative: RelativeMap, file: Path) -> None:
    """Take over an earlier run's relative rows. A damaged file is reported, and they are computed anew."""
    try:
        if file.is_file():
            relative.read(file)
    except DeepenError as error:
        warn(f"{error}: its rows are computed anew and the file replaced")
        with suppress(OSError):  # where it cannot be removed, `save` says that it cannot be replaced
            file.unlink(missing_ok=True)
    except OSError as error:
        warn(f"rows of earlier runs cannot be read from {file}: {error}")
