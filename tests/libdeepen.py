"""libdeepen's C interface (csrc/embed/deepen.h) through ctypes, and what it is compared with."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from deepen_ext import ops
from deepen_ext.space.relative_map import RelativeMap

VOCABS, ANCHORS, ENTRIES = (301, 517), 120, 16
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Settings(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        ("candidates", ctypes.c_int64),
        ("learning_rate", ctypes.c_double),
        ("steps", ctypes.c_int32),
        ("min_probability", ctypes.c_float),
        ("log_probs", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("device", ctypes.c_int32),
    )


class Failed(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Library:
    """The shared library through ctypes."""

    def __init__(self, prefix: Path) -> None:
        (path,) = prefix.glob("lib*/libdeepen.so")
        self.call = ctypes.CDLL(str(path))
        self.call.deepen_error.restype = ctypes.c_char_p
        self.call.deepen_default_settings.restype = Settings
        for free in (self.call.deepen_map_free, self.call.deepen_fusion_free):
            free.argtypes, free.restype = [ctypes.c_void_p], None

    def settings(self, **changed: Any) -> Settings:
        settings = self.call.deepen_default_settings()
        for name, value in changed.items():
            setattr(settings, name, value)
        return settings

    def check(self, status: int) -> None:
        if status:
            raise Failed(status, self.call.deepen_error().decode())

    def read(self, path: Path) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        self.check(self.call.deepen_map_read(str(path).encode(), ctypes.byref(found)))
        return found

    def fusion(self, maps: list[ctypes.c_void_p], **changed: Any) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        handles = (ctypes.c_void_p * len(maps))(*(one.value for one in maps))
        settings = self.settings(**changed)
        self.check(
            self.call.deepen_fusion_create(handles, len(maps), ctypes.byref(settings), ctypes.byref(found))
        )
        return found

    def step(
        self, fusion: ctypes.c_void_p, logits: list[torch.Tensor], weights: torch.Tensor
    ) -> torch.Tensor:
        """The tokens chosen, on the logits' device; there a step is launched on torch's stream."""
        chosen = torch.full((len(weights),), -1, dtype=torch.int32, device=weights.device)
        stream = torch.cuda.current_stream().cuda_stream if weights.is_cuda else None
        pointers = (ctypes.c_void_p * len(logits))(*(one.data_ptr() for one in logits))
        dtypes = (ctypes.c_int * len(logits))(*(DTYPES[one.dtype] for one in logits))
        weights_at, chosen_at = ctypes.c_void_p(weights.data_ptr()), ctypes.c_void_p(chosen.data_ptr())
        batch = ctypes.c_int64(len(weights))
        status = self.call.deepen_fusion_step(
            fusion, batch, pointers, dtypes, weights_at, chosen_at, ctypes.c_void_p(stream)
        )
        self.check(status)
        return chosen


def random_maps() -> list[RelativeMap]:
    """Of two members, whole."""
    torch.manual_seed(0)
    found = []
    for vocab in VOCABS:
        anchors = torch.randperm(vocab)[:ANCHORS]
        one = RelativeMap.from_embedding(torch.randn(vocab, 24), anchors, entries=ENTRIES)
        one.fill()
        found.append(one)
    return found


def save(maps: list[RelativeMap], folder: Path) -> list[Path]:
    """Their files."""
    files = [folder / f"{i}.map" for i in range(len(maps))]
    for one, path in zip(maps, files, strict=True):
        one.save(path)
    return files


def logits_of(batch: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [(3 * torch.randn(batch, vocab)).to(dtype) for vocab in VOCABS]


def by_python(
    maps: list[RelativeMap], logits: list[torch.Tensor], weights: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The main model's new logits, and the tokens chosen."""
    new = logits[0].clone()
    k = settings.pop("candidates", 128)
    members = [
        ops.FuseInput(ops.topk_softmax(one, min(k, one.shape[1])), own.rows)
        for one, own in zip(logits, maps, strict=True)
    ]
    least = settings.pop("min_probability", 1e-4)
    asked = {"learning_rate": 0.15, "steps": 5, "log_probs": True} | settings
    chosen = ops.fuse(new, members, weights, min_probability=least, **asked)[1]
    return new, chosen
