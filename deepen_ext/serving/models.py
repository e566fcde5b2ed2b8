"""What is served, by name: ensembles, and each of their members alone from the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.members.member import Member
from deepen_ext.serving.refusals import UnknownModel

# Most probable tokens that a request may ask for.
MOST_OF_ENSEMBLE = 5
MOST_OF_MEMBER = 128
OWNER = "deepen-ext"


@dataclass(frozen=True)
class Model:
    """One of the names that requests may have.

    Attributes:
        name: of the model.
        ensemble: what writes.
        created: seconds since 1970.
    """

    name: str
    ensemble: Ensemble
    created: int = 0

    @property
    def main(self) -> Member:
        """Its tokens are the text's."""
        return self.ensemble.members[0]

    @property
    def alone(self) -> bool:
        """Whether it is a member alone."""
        return len(self.ensemble.members) == 1

    @property
    def most_logprobs(self) -> int:
        """Of a completion."""
        return MOST_OF_MEMBER if self.alone else MOST_OF_ENSEMBLE

    def card(self) -> dict[str, Any]:
        """As /v1/models has it."""
        own = {
            "kind": "member" if self.alone else "ensemble",
            "members": self.ensemble.names,
            "weights": self.ensemble.weights_or_rule,
            "fuser": self.ensemble.method,
            "backends": self.ensemble.backends,
        }
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": OWNER,
            "parent": None,
            "max_model_len": self.main.context_length,
            "meta": {"n_vocab": self.main.vocab_size},
            "deepen": own,
        }


class Models:
    """All that is served."""

    def __init__(self, ensembles: Mapping[str, Ensemble], created: int = 0) -> None:
        """Ensembles by name; a member alone has an ensemble of its own."""
        self._models = {name: Model(name, one, created) for name, one in ensembles.items()}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def named(self, name: str) -> Model:
        """The model of this name.

        Raises:
            UnknownModel: there is none.
        """
        if name not in self._models:
            raise UnknownModel(f"there is no model {name[:100]!r}; there are {', '.join(self._models)}")
        return self._models[name]

    def member(self, name: str) -> Models:
        """The member alone of this name, as all that is served.

        Raises:
            UnknownModel: there is none.
        """
        found = self._models.get(name)
        if found is None or not found.alone:
            names = ", ".join(one.name for one in self if one.alone)
            raise UnknownModel(f"there is no member {name[:100]!r}; there are {names}")
        return Models({name: found.ensemble}, found.created)


def with_members(ensembles: Mapping[str, Ensemble]) -> dict[str, Ensemble]:
    """The ensembles, and each of their members alone; one that several share is there once.

    Raises:
        InputError: an ensemble has the name of a member.
    """
    found = dict(ensembles)
    seen: list[Member] = []
    names = _names([one for ensemble in ensembles.values() for one in ensemble.members])
    for ensemble in ensembles.values():
        for member in ensemble.members:
            if any(member is one for one in seen):
                continue
            seen.append(member)
            name = names[id(member)]
            if name in found:
                raise InputError(
                    f"the ensemble {name} has the name of a member; give it another, as in --ensemble "
                    f"my-{name}=preset.yaml"
                )
            found[name] = Ensemble([member], fuser="single")
    return found


def _names(members: Sequence[Member]) -> dict[int, str]:
    """Each member's name by its `id`, numbered where two different ones have the same."""
    found: dict[int, str] = {}
    for member in members:
        if id(member) in found:
            continue
        name, number = member.name, 1
        while name in found.values():
            number += 1
            name = f"{member.name}#{number}"
        found[id(member)] = name
    return found
