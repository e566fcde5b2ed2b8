"""Ray itself: imported, connected, and asked what it has."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepen_ext.cluster.placement import Placement
from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.progress import Progress

_SECONDS = 5.0  # in which a cluster takes a connection; Ray itself tries for two minutes

INSTALL = "pip install 'deepen-ext[ray]'"


def import_ray() -> Any:
    """The module.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import ray
        import ray.exceptions
        import ray.util
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ModelError(f"placement and replicas need Ray, which is not installed: {INSTALL}") from error
    return ray


def connect(address: str | None, progress: Progress | None = None) -> Any:
    """Ray's module, connected to a cluster.

    A program that has called `ray.init` keeps its cluster. Otherwise the address is joined; without one Ray
    decides as `ray.init()` does: RAY_ADDRESS, a cluster that runs on this machine, or a new one here, which
    ends with this process.

    Raises:
        ModelError: Ray is not installed.
        InputError: there is no cluster at this address, or the program is connected to another one.
    """
    ray = import_ray()
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", there):
            raise InputError(
                f"placement: address is {address!r}, and this program is connected to Ray at {there}; leave "
                "address out, or call ray.init with it before anything else"
            )
        return ray
    if progress is not None:
        progress("Starting Ray, or joining a cluster that runs here" if address is None else "Joining Ray")
    _check_answers(address)
    try:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=False,  # standard output is for results
            logging_level=logging.WARNING,
        )
    except Exception as error:  # ConnectionError, ValueError, RuntimeError: Ray has no class for it
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "Ray cannot be started" if address is None else f"no Ray cluster answers at {address!r}"
        raise InputError(f"placement: {where}: {first}") from error
    return ray


def _check_answers(address: str | None) -> None:
    """That somebody listens at the address that Ray would join; it may be a killed cluster's.

    Raises:
        InputError: nobody does; the message says where the address comes from.
    """
    # Where Ray looks, on Linux. It is read, never written.
    temporary = os.environ.get("TMPDIR", "/tmp")
    note = Path(os.environ.get("RAY_TMPDIR", temporary)) / "ray" / "ray_current_cluster"
    found, source = address, ""
    if address in (None, "auto"):
        found, source = os.environ.get("RAY_ADDRESS"), ", which RAY_ADDRESS names; set it anew, or unset it"
        if not found:
            found = note.read_text().strip() if note.is_file() else None
            source = (
                f", which {note} names: it ended without removing that file. Remove it, or set "
                "RAY_ADDRESS=local for a cluster of this program alone"
            )
    host, _, port = (found or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # "local", or nothing that has a port
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except OSError as error:
        raise InputError(f"placement: no Ray cluster answers at {found!r} ({error}){source}") from error


def schedule(ray: Any, placement: Placement, what: str) -> dict[str, Any]:
    """The options with which Ray makes the actor, after a look at whether the cluster can ever hold it.

    Args:
        ray: the module, connected.
        placement: of the actor.
        what: the actor, for the message.

    Raises:
        InputError: no node, bundle or group of that name, or none that is large enough; the message says what
            there is.
    """
    options: dict[str, Any] = {
        "num_cpus": placement.num_cpus,
        "num_gpus": placement.num_gpus,
        "max_restarts": 0,  # its sessions would be lost all the same
    }
    strategies = ray.util.scheduling_strategies
    if placement.placement_group is not None:
        group = _group(ray, placement, what)
        bundles = dict(enumerate(group.bundle_specs))
        if placement.bundle is not None:
            if placement.bundle not in bundles:
                raise InputError(
                    f"{what}: the placement group has {len(bundles)} bundles, and bundle is "
                    f"{placement.bundle}; they are counted from 0"
                )
            bundles = {placement.bundle: bundles[placement.bundle]}
        there = {f"bundle {number}": bundle for number, bundle in bundles.items()}
        _check_fits(placement, there, what)
        options["scheduling_strategy"] = strategies.PlacementGroupSchedulingStrategy(
            placement_group=group,
            placement_group_bundle_index=-1 if placement.bundle is None else placement.bundle,
        )
        return options
    nodes = {one["NodeID"]: one for one in ray.nodes() if one["Alive"]}
    if placement.node is not None:
        nodes = {
            number: one
            for number, one in nodes.items()
            if placement.node in (number, one["NodeManagerAddress"])
        }
        if not nodes:
            known = ", ".join(f"{one['NodeManagerAddress']} ({one['NodeID']})" for one in _alive(ray))
            raise InputError(f"{what}: the cluster has no node {placement.node!r}; there are {known}")
        options["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(next(iter(nodes)), False)
    _check_fits(placement, {one["NodeManagerAddress"]: one["Resources"] for one in nodes.values()}, what)
    return options


def free_now(ray: Any) -> str:
    """What the cluster has left at this moment, for messages."""
    return _counted(ray.available_resources())


def _alive(ray: Any) -> list[dict[str, Any]]:
    return [one for one in ray.nodes() if one["Alive"]]


def _group(ray: Any, placement: Placement, what: str) -> Any:
    group = placement.placement_group
    if not isinstance(group, str):
        return group
    try:
        return ray.util.get_placement_group(group)
    except ValueError as error:
        raise InputError(f"{what}: the cluster has no placement group {group!r}") from error


def _check_fits(placement: Placement, there: Mapping[str, Mapping[str, float]], what: str) -> None:
    """That at least one place is large enough when nothing else is in it."""
    for own in there.values():
        if all(own.get(name, 0) >= count for name, count in placement.resources.items()):
            return
    has = "; ".join(f"{name} has {_counted(own)}" for name, own in there.items())
    raise InputError(f"{what}: {placement} fits nowhere, not even when all is idle: {has}. Ask for less")


def _counted(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
