"""Two fusion steps at the default settings, of 1 and of 32 rows, for a profiler (make gpu-profile)."""

from __future__ import annotations

import torch

from deepen_ext import RelativeMap
from deepen_ext.fusers import DeepenFuser

VOCABS, ANCHORS, DIM = (128_256, 262_144), 100_000, 640


def main(device: str = "cuda:0") -> None:
    maps = [
        RelativeMap.from_embedding(
            torch.randn(vocab, DIM, device=device, dtype=torch.bfloat16), torch.arange(ANCHORS)
        )
        for vocab in VOCABS
    ]
    fuser = DeepenFuser(maps, learning_rate=0.15, min_probability=1e-4)
    for batch in (1, 32):
        step = fuser.step([2 * torch.randn(batch, vocab, device=device) for vocab in VOCABS], [0.5, 0.5])
        print(f"{batch} rows: tokens {step.read(step.chosen)[0][:4]} ...", flush=True)


if __name__ == "__main__":
    main()
