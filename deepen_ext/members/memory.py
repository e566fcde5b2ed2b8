"""What a batch would take, and what a device still has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from deepen_ext.members.member import Member

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_FILES = (  # the limit and the use of version 2 and of version 1
    (_CGROUPS / "memory.max", _CGROUPS / "memory.current"),
    (_CGROUPS / "memory/memory.limit_in_bytes", _CGROUPS / "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Shortage:
    """A device that has less than what is wanted of it, in bytes."""

    device: torch.device
    wanted: int
    available: int

    def __str__(self) -> str:
        return (
            f"need about {self.wanted / 1e9:.1f} GB on {self.device} for caches and logits, and "
            f"{self.available / 1e9:.1f} GB are free"
        )


Held = Callable[[Member, int], Mapping[torch.device, int]]

_givers: list[Callable[[torch.device], None]] = []


def gives_back(function: Callable[[torch.device], None]) -> Callable[[torch.device], None]:
    """Have this function called before a device is found short: it frees what a backend keeps there idle."""
    _givers.append(function)
    return function


def find_shortage(
    lanes: int,
    lengths: Iterable[tuple[Member, int]],
    held: Held | None = None,
    used: int | None = None,
) -> Shortage | None:
    """The first device that lacks the memory for sessions of the members side by side, if there is one.

    What backends keep idle for other models is given back where it is in the way.

    Args:
        lanes: of each session.
        lengths: the members, and how many tokens a lane of each is to hold.
        held: bytes by device that the sessions of a member with so many lanes hold already.
        used: how many of the lanes hold states; None for all.
    """
    wanted: dict[torch.device, int] = {}
    for member, tokens in lengths:
        already = {} if held is None else held(member, lanes)
        for device, size in member.backend.bytes_needed(lanes, tokens, used).items():
            wanted[device] = wanted.get(device, 0) + max(size - already.get(device, 0), 0)
    for device, size in wanted.items():
        if size > available_bytes(device):
            for give_back in _givers:
                give_back(device)
        if size > (available := available_bytes(device)):
            return Shortage(device, size, available)
    return None


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device: of a machine, also below its control group's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    # To the kernel what files back is available, the members' own weights too. Where a batch took it, each
    # step would read them from the disk again: several times the time a token, and nothing to show why.
    available = max(_kernel_bytes(_MEMINFO, "MemAvailable") - _kernel_bytes(_STATUS, "RssFile"), 0)
    for limit, used in _CGROUP_FILES:
        # "max" where there is no limit. What is cached from files counts as used, and can be given back.
        if limit.is_file() and (bound := limit.read_text().strip()).isdigit():
            available = min(available, int(bound) - int(used.read_text()) + _file_cache(used.parent))
    return available


def _kernel_bytes(file: Path, name: str) -> int:
    """A line ``name: ... kB`` of a file that the kernel makes, or 0 (gVisor says no RssFile)."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", file.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _file_cache(group: Path) -> int:
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
