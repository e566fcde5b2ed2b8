"""Short chunks over fixed buffers: on CUDA one graph launch a step instead of a thousand kernel launches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from deepen_ext.ground.warning import warn
from deepen_ext.members.hf.kv_cache import BLOCK

WIDTHS = (1, 2, 4, 8)  # tokens a lane of the pieces that graphs are made for

_capturing = threading.Lock()  # torch allows one capture at a time in a process
# Graphs whose capture did not end well. torch's allocator of pinned memory goes on asking them whether a
# stream is theirs, and no call from Python ends that: they must stay.
_failed: list[torch.cuda.CUDAGraph] = []

# What to run: int64 inputs [3, lanes, width] (ids, positions, slots) and the end of the slots to look at.
Forward = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass
class _Step:
    inputs: torch.Tensor
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None


class FixedSteps:
    """Forwards of one shape each: by width, slots looked at and positions wanted.

    On CUDA they are captured when they come again.
    All read their inputs from buffers of their own, so what is captured holds for every later step. They
    share one memory pool: a step's logits last until the next step.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._name = name
        self._captures = device.type == "cuda"
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self._steps: dict[tuple[int, int, int], _Step] = {}
        self._slots = 0

    def run(
        self,
        inputs: torch.Tensor,
        end: int,
        slots: int,
        positions: int,
        forward: Forward,
        *,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The logits [lanes, positions, V] of these inputs (on the host).

        Args:
            inputs: see `Forward`.
            end: slots 0 to ``end - 1`` are needed.
            slots: of the cache.
            positions: how many of the last positions have logits.
            forward: what to run.
            ids: [lanes, width] on the device, in the place of those of the inputs.
        """
        if slots != self._slots:  # the cache has grown: its buffers are others
            self.forget()
            self._slots = slots
        end = min(max(BLOCK, 1 << (end - 1).bit_length()), slots)
        key = (inputs.shape[2], end, positions)
        step, is_new = self._steps.get(key), key not in self._steps
        if step is None:
            step = _Step(torch.empty(inputs.shape, dtype=torch.long, device=self._device))
        step.inputs.copy_(inputs, non_blocking=True)
        if ids is not None:
            step.inputs[0].copy_(ids)
        if is_new:  # runs as it is: nothing is captured that comes once, and capture finds all warm
            logits = forward(step.inputs, end)  # every layer has its buffers now: none is made in a capture
            self._steps[key] = step
            return logits
        if step.graph is None and self._captures:
            self._capture(step, end, forward)
        if step.graph is None or step.logits is None:
            return forward(step.inputs, end)
        step.graph.replay()
        return step.logits

    def forget(self) -> None:
        """Free all steps."""
        self._steps.clear()
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    @property
    def captured(self) -> list[tuple[int, int]]:
        """Width and end of the steps that are graphs by now."""
        return [key[:2] for key, step in self._steps.items() if step.graph is not None]

    def _capture(self, step: _Step, end: int, forward: Forward) -> None:
        graph = torch.cuda.CUDAGraph()
        assert self._pool is not None
        try:
            with _capturing:
                _free_for_a_capture(self._device)
                # Not `torch.cuda.graph`: that waits for the device and empties torch's cache each time. Other
                # threads may use the device meanwhile: only what this one does is watched.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    step.logits = forward(step.inputs, end)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._captures = False
            step.logits = None
            # torch ends its allocators' part of a capture only where the capture itself ended well. Left
            # open, no block that several streams have used would ever be free again.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
                _failed.append(graph)
                torch._C._cuda_releasePool(self._device.index or 0, self._pool)
            reason = str(error).strip().splitlines()[0]
            warn(f"{self._name}: its steps cannot be captured as CUDA graphs and run without: {reason}")
        else:
            step.graph = graph


def _free_for_a_capture(device: torch.device) -> None:
    """Empty torch's cache if a capture might find no memory: it takes new blocks, and cannot empty it.

    What a step takes it has taken before, when it ran as it is: no more than the cache holds by now.
    """
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.cuda.mem_get_info(device)[0] < unused:
        torch.cuda.empty_cache()
