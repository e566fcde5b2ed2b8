"""deepen-ext: language models with different vocabularies write one text, fused at every token by DeePEn.

Huang et al., "Ensemble Learning for Heterogeneous Large Language Models with Deep Parallel Collaboration",
NeurIPS 2024 (arXiv 2404.12715), on a C++ core.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepen_ext.errors import DeepenError, DeepenWarning, InputError, MemberLost, ModelError
from deepen_ext.ground.one_distribution import check_one_distribution

if TYPE_CHECKING:
    from deepen_ext.decoding.generation import BatchGeneration, Generation, Timings
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.fusers.fuse_logits import fuse_logits
    from deepen_ext.measure.doctor.diagnose import diagnose
    from deepen_ext.measure.evaluation.runner import evaluate
    from deepen_ext.members import embedded as demo
    from deepen_ext.members.loading import load_member, load_members
    from deepen_ext.replicas import Replicas
    from deepen_ext.space.relative_map import RelativeMap

__version__ = "0.1.0"

check_one_distribution(Path(__file__).parents[1])

# Imported when first asked for: torch and transformers take seconds, and `deepen-ext --help` needs neither.
_HOME = {
    "BatchGeneration": "deepen_ext.decoding.generation",
    "Ensemble": "deepen_ext.ensemble",
    "Generation": "deepen_ext.decoding.generation",
    "RelativeMap": "deepen_ext.space.relative_map",
    "Replicas": "deepen_ext.replicas",
    "Timings": "deepen_ext.decoding.generation",
    "diagnose": "deepen_ext.measure.doctor.diagnose",
    "evaluate": "deepen_ext.measure.evaluation.runner",
    "fuse_logits": "deepen_ext.fusers.fuse_logits",
    "load_member": "deepen_ext.members.loading",
    "load_members": "deepen_ext.members.loading",
}

__all__ = [
    "BatchGeneration",
    "DeepenError",
    "DeepenWarning",
    "Ensemble",
    "Generation",
    "InputError",
    "MemberLost",
    "ModelError",
    "RelativeMap",
    "Replicas",
    "Timings",
    "__version__",
    "demo",
    "diagnose",
    "evaluate",
    "fuse_logits",
    "load_member",
    "load_members",
]


def __getattr__(name: str) -> Any:
    if name == "demo":
        return import_module("deepen_ext.members.embedded")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
