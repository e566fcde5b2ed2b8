"""Stores the demo pair's real rows for the GPU benchmarks, which have neither the models nor a network.

    python bench/demo_rows.py      writes bench/data/demo_rows.safetensors

For the token after each of `PROMPTS` prompts and for each member: its 128 most probable tokens and their
probabilities, and the relative rows of these tokens (values as float16). Real rows differ from random ones:
a few anchors are named by nearly every candidate, and one after the other is summed by one thread.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import PROMPTS, TIMED
from safetensors.torch import save_file

from deepen_ext import Ensemble, demo
from deepen_ext.members.loading import load_members
from deepen_ext.ops import topk_softmax

FILE = Path(__file__).resolve().parent / "data" / "demo_rows.safetensors"
ROWS, K = 4, 128


def main() -> None:
    members = load_members(demo.members(), backend="transformers")
    ensemble = Ensemble(members, cache=False, **TIMED)
    tensors: dict[str, torch.Tensor] = {"anchors": torch.tensor(len(ensemble.anchors))}
    for i, (member, relative) in enumerate(zip(members, ensemble.maps, strict=True)):
        ids = [member.vocabulary.prefix_ids + member.vocabulary.encode(one) for one in PROMPTS[:ROWS]]
        with torch.no_grad():
            logits = torch.cat([member.model(torch.tensor([one])).logits[:, -1] for one in ids])
        top = topk_softmax(logits.contiguous(), K)
        relative.ensure(top.ids)
        chosen = top.ids.long()
        assert relative.rows.columns is not None
        assert relative.rows.rest is not None
        tensors |= {
            f"ids{i}": top.ids,
            f"probs{i}": top.probs,
            f"columns{i}": relative.rows.columns[chosen],
            f"values{i}": relative.rows.values[chosen].half(),
            f"rest{i}": relative.rows.rest[chosen],
        }
    FILE.parent.mkdir(exist_ok=True)
    save_file({name: one.contiguous() for name, one in tensors.items()}, FILE)
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
