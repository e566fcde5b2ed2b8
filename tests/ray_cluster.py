"""A real Ray on this machine, started once in a test process and ended with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray._private.state import actors  # the public one asks the dashboard, which is not there

TESTS = Path(__file__).resolve().parent


def start_ray(cpus: int = 4) -> None:
    """Ray with room for `cpus` actors of one CPU; its workers find the modules of the tests."""
    if ray.is_initialized():
        return
    folders = [str(TESTS.parent), str(TESTS), str(TESTS / "contract")]
    # Read by the processes that Ray starts. Without the second its workers give way to all others (nice 15).
    wanted = {"PYTHONPATH": os.pathsep.join(folders), "RAY_worker_niceness": "0"}
    with patch.dict(os.environ, wanted):
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )


def in_actor(actor: Any, function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives that is called with the actor's own object, in its process."""
    return ray.get(actor.__ray_call__.remote(function, *args), timeout=30)


def kill_process(actor: Any) -> None:
    """kill -9."""
    os.kill(in_actor(actor, lambda _: os.getpid()), signal.SIGKILL)


def actors_alive() -> set[str]:
    """Their names. Compare sets, not counts: an actor of an earlier test may still be dying."""
    return {name for name, one in actors().items() if one["State"] != "DEAD"}


def processes_of(kind: str) -> list[int]:
    """Of the actors of a class."""
    return [
        one["Pid"] for one in actors().values() if one["ActorClassName"] == kind and one["State"] == "ALIVE"
    ]


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what happens soon."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
