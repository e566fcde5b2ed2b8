"""Where an actor of Ray goes: what `placement=` may say. Ray is not needed to check it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from deepen_ext.errors import InputError, shown
from deepen_ext.ground.numbers import real_number, whole_number


@dataclass(frozen=True)
class Placement:
    """The resources of one actor, and the machine it is on.

    Attributes:
        num_cpus: CPUs that Ray reserves. They are also the threads of torch in the actor, unless the member's
            `threads` or the variable OMP_NUM_THREADS says otherwise.
        num_gpus: GPUs that Ray reserves; the actor sees no others. A part such as 0.5 shares a GPU.
        node: the machine, by Ray's node id or by its IP address; None for any.
        placement_group: the user's own, or its name; the actor takes its resources from it.
        bundle: the number of the group's bundle; None for any.
        address: of the cluster, as `ray.init` takes it, for a program that has not called `ray.init`.
    """

    num_cpus: float = 1
    num_gpus: float = 0
    node: str | None = None
    placement_group: Any = None
    bundle: int | None = None
    address: str | None = None

    @classmethod
    def read(cls, given: Any) -> Placement:
        """A placement as the user gives it, checked.

        Args:
            given: a mapping such as ``{"num_cpus": 2, "num_gpus": 1}``; {} for one CPU anywhere.

        Raises:
            InputError: no mapping, a key that there is not, a value of a wrong type or out of range.
        """
        names = [one.name for one in fields(cls)]
        if not isinstance(given, Mapping):
            raise InputError(
                f"placement is {shown(given)}; give a mapping such as {{'num_cpus': 2, 'num_gpus': 1}}"
            )
        for key in given:
            if key not in names:
                raise InputError(f"placement has no {shown(key)}; it has {', '.join(names)}")
        found = cls(**given)
        for name in ("num_cpus", "num_gpus"):
            real_number(f"placement: {name}", getattr(found, name), "0 or more", lambda x: 0 <= x < 1e6)
        if found.num_gpus > 1 and found.num_gpus != int(found.num_gpus):
            raise InputError(
                f"placement: num_gpus is {found.num_gpus}; above 1 Ray takes whole numbers alone"
            )
        for name in ("node", "address"):
            value = getattr(found, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise InputError(f"placement: {name} is {shown(value)}; give a text")
        group = found.placement_group
        if group is not None and not ((isinstance(group, str) and group) or hasattr(group, "bundle_specs")):
            raise InputError(
                f"placement: placement_group is {shown(group)}; give the group that "
                "ray.util.placement_group made, or its name"
            )
        if found.bundle is not None:
            whole_number("placement: bundle", found.bundle, 0)
            if group is None:
                raise InputError("placement: bundle is for placement_group; give the group, or leave it out")
        if group is not None and found.node is not None:
            raise InputError(
                "placement: node and placement_group exclude each other: a group has its nodes already"
            )
        return found

    @property
    def resources(self) -> dict[str, float]:
        """What Ray counts, by its names."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus}

    def __str__(self) -> str:
        """For messages: what differs from the defaults of Ray."""
        words = [f"num_cpus {self.num_cpus:g}"]
        if self.num_gpus:
            words.append(f"num_gpus {self.num_gpus:g}")
        if self.node is not None:
            words.append(f"node {self.node}")
        if self.placement_group is not None:
            where = "" if self.bundle is None else f", bundle {self.bundle}"
            words.append(f"a placement group{where}")
        return ", ".join(words)
