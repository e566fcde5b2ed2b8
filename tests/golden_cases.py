"""The authors' own inputs and outputs: the small cases from this folder, all of them where ../shared is
there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

_HERE = Path(__file__).parent / "golden"
_SHARED = Path(__file__).parents[2] / "shared" / "golden"


@dataclass(frozen=True)
class GoldenCase:
    name: str
    learning_rate: float
    steps: int
    weights: list[float]
    temperature: float
    tensors: dict[str, torch.Tensor]

    def each(self, kind: str) -> list[torch.Tensor]:
        """`kind`.i of every member, the main model first."""
        return [self.tensors[f"{kind}.{i}"] for i in range(len(self.weights))]


def golden_names() -> list[str]:
    folders = [folder for folder in (_HERE, _SHARED) if folder.is_dir()]
    return sorted({file.stem for folder in folders for file in folder.glob("*.safetensors")})


def golden_case(name: str) -> GoldenCase:
    file = next(
        folder / f"{name}.safetensors"
        for folder in (_HERE, _SHARED)
        if (folder / f"{name}.safetensors").is_file()
    )
    facts = json.loads((_HERE / "cases.json").read_text())[name]
    return GoldenCase(name, facts["lr"], facts["T"], facts["w"], facts["tau"], load_file(file))
