"""Many prompts shared out over replicas of a whole ensemble, on the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deepen_ext.cluster.pool import Pool, ReplicasLost
from deepen_ext.decoding.generation import BatchGeneration, Generation
from deepen_ext.decoding.prompts import Messages, is_batch
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.ground.closing import Closing
from deepen_ext.ground.numbers import whole_number
from deepen_ext.ground.progress import Progress
from deepen_ext.members.source import absolute_name

_OF_ONE_PROCESS = ("on_text", "streamer", "trace", "shared")


class Replicas(Closing):
    """Whole ensembles in actors of Ray, each with all its members.

        with Replicas(["a", "b"], 4, placement={"num_gpus": 1}) as replicas:
            generations = replicas.generate_many(prompts, max_new_tokens=64)

    This process loads no model. A replica that is lost is not replaced: its prompts go to the others.
    """

    def __init__(
        self,
        members: Sequence[str | Path],
        replicas: int,
        *,
        placement: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        """Start the actors and load an ensemble in each.

        Args:
            members: as in `Ensemble.from_pretrained`; files must be at the same paths on every machine.
            replicas: how many.
            placement: of each replica (see `deepen_ext.cluster.placement`); None for one CPU anywhere.
            progress: called with a line of text as they start, and when one is lost.
            options: those of `Ensemble.from_pretrained`.

        Raises:
            InputError: see `Ensemble.from_pretrained`; a cluster without room for all replicas.
            ModelError: see `Ensemble.from_pretrained`; Ray is not installed.
        """
        make = partial(Ensemble.from_pretrained, [absolute_name(one) for one in members], **options)
        self._pool = Pool(make, replicas, placement, progress)

    def generate_many(
        self, prompts: Sequence[str] | Sequence[Messages], *, batch_size: int = 16, **settings: Any
    ) -> list[Generation]:
        """Continue each prompt, as `Ensemble.generate` continues a list of prompts.

        Args:
            prompts: texts, or chats.
            batch_size: how many a replica writes side by side, and gets at a time.
            settings: those of `Ensemble.generate`. A seed is a list of one for each prompt: then the texts do
                not depend on which replica writes them.

        Returns:
            in the order of the prompts; `timings` are those of the batch that the prompt was in.

        Raises:
            InputError: see `Ensemble.generate`; a setting that needs one process.
            ModelError: see `Ensemble.generate`.
            ReplicasLost: all replicas were lost. `done` has a `Generation` for each prompt, or None.
        """
        if not isinstance(prompts, Sequence) or not is_batch(prompts):
            raise InputError(
                "prompts must be a list of texts or of chats; put one prompt into a list, and of a generator "
                "give list(...)"
            )
        size = whole_number("batch_size", batch_size, 1)
        for name in _OF_ONE_PROCESS:
            if settings.get(name) is not None:
                raise InputError(f"{name} is for a text that is written in this process; leave it out")
        seeds = settings.pop("seed", None)
        if seeds is not None and (not isinstance(seeds, Sequence) or len(seeds) != len(prompts)):
            raise InputError(
                f"seed must be a list of {len(prompts)} numbers, one for each prompt: with one number for "
                "all, a text would depend on which replica writes it"
            )
        starts = range(0, len(prompts), size)
        calls = (
            (
                (
                    prompts[start : start + size],
                    None if seeds is None else seeds[start : start + size],
                    settings,
                )
            )
            for start in starts
        )
        found: list[Generation | None] = [None] * len(prompts)
        try:
            for number, written in self._pool.share_out(_generate, calls):
                found[starts[number] : starts[number] + size] = written
        except ReplicasLost as error:
            error.done = found
            raise
        return [one for one in found if one is not None]

    def close(self) -> None:
        """End the actors."""
        self._pool.close()


def _generate(
    ensemble: Ensemble, prompts: Sequence[Any], seeds: Sequence[int] | None, settings: Mapping[str, Any]
) -> list[Generation]:
    seeded = {} if seeds is None else {"seed": list(seeds)}
    batch: BatchGeneration = ensemble.generate(list(prompts), **seeded, **settings)
    return batch.generations
