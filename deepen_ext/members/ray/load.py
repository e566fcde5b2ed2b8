"""Members in actors: the model is loaded there, the tokenizer here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepen_ext.cluster.actors import Lost, await_place, end, get, start_actor
from deepen_ext.cluster.placement import Placement
from deepen_ext.errors import MemberLost, ModelError
from deepen_ext.ground.progress import Progress
from deepen_ext.members import embedded
from deepen_ext.members.gguf.tokenizer import load_gguf_tokenizer
from deepen_ext.members.load_options import LoadOptions
from deepen_ext.members.member import Member
from deepen_ext.members.ray.actor import MemberActor
from deepen_ext.members.ray.backend import RayBackend
from deepen_ext.members.source import Source, absolute_name, split_adapter
from deepen_ext.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Loading:
    """A member that is being loaded in its actor; several are at once."""

    name: str
    source: Source
    options: LoadOptions
    placement: Placement
    actor: Any
    version: Any  # on its way, as the facts
    facts: Any

    def end(self) -> None:
        """End the actor: something could not be loaded, here or elsewhere."""
        end(self.actor)

    def member(self, progress: Progress | None = None) -> Member:
        """The member, when it is loaded.

        Raises:
            InputError: there was no room for the actor; what loading raises there.
            ModelError: what loading raises there; the tokenizer here is not that of the model there.
            MemberLost: the actor was lost while it loaded.
        """
        await_place(self.actor, self.version, self.placement, self.name)
        if progress is not None:
            progress(f"Loading {self.name} in an actor of Ray ({self.placement})")
        tokenizer = _load_tokenizer(self.source, self.options, progress)
        try:
            facts = get(self.facts, None)  # as long as it takes, as in process
            there = get(self.actor.vocabulary.remote(), None)
        except Lost as error:
            raise MemberLost(self.name, f"{error}, while the model was loaded there") from error
        backend = RayBackend(self.actor, facts, self.options.timeout)
        vocabulary = Vocabulary.from_tokenizer(tokenizer, backend.vocab_size, name=backend.name)
        if vocabulary.fingerprint != there:
            raise ModelError(
                f"{backend.name}: the tokenizer read here is not that of the model in the actor; see to it "
                "that both machines have the same files"
            )
        return Member(backend.name, backend, tokenizer, vocabulary, tuple(facts["eos_ids"]))


def start_loading(
    load: Callable[..., Member],
    name: str,
    source: Source,
    options: LoadOptions,
    progress: Progress | None = None,
) -> Loading:
    """Begin to load a member in an actor of its own.

    Args:
        load: `load_member`. It is called there by its name in this package.
        name: the member's, as the caller gave it.
        source: what the name stands for here. Its path must lead to the same files there.
        options: with a placement.
        progress: see `start_actor`.

    Raises:
        InputError: the cluster can never hold the actor.
        ModelError: Ray is not installed.
    """
    placement = Placement.read(options.placement)
    actor, version = start_actor(MemberActor, placement, name, progress)
    given = {key: _absolute(key, value) for key, value in options.given().items()}
    for key in ("placement", "timeout"):
        given.pop(key, None)
    there = absolute_name(split_adapter(name)[0])
    return Loading(name, source, options, placement, actor, version, actor.load.remote(load, there, given))


def _absolute(key: str, value: Any) -> Any:
    """A path as an actor, whose working folder is another, can read it."""
    return str(Path(value).absolute()) if key == "offload_folder" or isinstance(value, Path) else value


def _load_tokenizer(
    source: Source, options: LoadOptions, progress: Progress | None
) -> PreTrainedTokenizerBase:
    """The tokenizer alone, from the files that the backends read it from."""
    if source.is_gguf:
        path = source.path
        if source.embedded is not None:
            path = embedded.gguf_file(source.embedded, progress)
        assert path is not None
        return load_gguf_tokenizer(path, path.stem)
    from deepen_ext.members.hf.adapter import adapter_tokenizer
    from deepen_ext.members.hf.tokenizer_file import load_tokenizer

    trusted = options.trust_remote_code
    if options.adapter is not None and (
        own := adapter_tokenizer(options.adapter, str(options.adapter), trusted)
    ):
        return own
    target = source.hub if source.path is None else source.path
    assert target is not None
    name = target if isinstance(target, str) else target.name
    found: PreTrainedTokenizerBase = load_tokenizer(
        target, name, trust_remote_code=trusted, revision=options.revision
    )
    return found
