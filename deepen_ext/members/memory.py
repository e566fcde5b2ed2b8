"""What a batch would take, and what a device still has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deepen_ext.members.hf.graphs import free_idle, idle_bytes
from deepen_ext.members.hf.kv_cache import CHUNK, cache_bytes, largest_head
from deepen_ext.members.member import Member

if TYPE_CHECKING:
    from deepen_ext.decoding.shared_forwards import SharedForwards

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


def find_shortage(
    rows: int, lengths: Iterable[tuple[Member, int]], shared: SharedForwards | None = None
) -> Shortage | None:
    """The first device that lacks the memory for sessions of ``rows`` rows side by side, if one does.

    What idle rooms and shared caches of these members hold already is not asked for again; idle rooms of
    other models are given back where they are in the way.

    Args:
        rows: of each session.
        lengths: the members, and how many tokens a row of each is to hold.
        shared: forwards that the sessions are taken from.
    """
    wanted: dict[torch.device, int] = {}
    for member, tokens in lengths:
        held = idle_bytes(member) + (0 if shared is None else shared.cache_bytes(member, rows))
        more = max(estimate_bytes(member, rows, tokens) - held, 0)
        wanted[member.device] = wanted.get(member.device, 0) + more
    for device, size in wanted.items():
        if size > available_bytes(device):
            free_idle(device)
        if size > (available := available_bytes(device)):
            return Shortage(device, size, available)
    return None


def estimate_bytes(member: Member, rows: int, tokens: int) -> int:
    """Bytes that a session of ``rows`` rows with ``tokens`` tokens each takes, beside the model's weights.

    The cache, the logits of two steps, and the largest activations of one layer; on CUDA also cuBLAS's
    workspace on the session's stream.
    """
    config = member.model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = largest_head(config)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    fed = min(rows * tokens, CHUNK)
    activations = fed * (4 * hidden + 3 * inner + 4 * heads * head_dim)
    # Masks, and keys and values repeated for every query head, where lanes are fed together.
    attention = 2 * fed * tokens + 2 * rows * tokens * heads * head_dim if rows > 1 else fed * tokens
    logits = 2 * rows * member.vocab_size
    others = (activations + attention + logits) * member.dtype.itemsize
    if member.device.type == "cuda":
        others += _cublas_workspace(member.device)
    return int(cache_bytes(member, rows, tokens) + others)


def _cublas_workspace(device: torch.device) -> int:
    """Bytes that torch takes for cuBLAS on each stream; captured steps use their stream's.

    As `parseChosenWorkspaceSize` in torch's CublasHandlePool.cpp, where Blackwell's is as large as Hopper's
    from some version on. torch before 2.13 does not tell.
    """
    if pairs := re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")):
        return 1024 * sum(int(size) * int(count) for size, count in pairs)
    hopper = torch.cuda.get_device_capability(device)[0] >= 9
    return 1024 * (8 * 4096 if hopper else 2 * 4096 + 8 * 16)


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
