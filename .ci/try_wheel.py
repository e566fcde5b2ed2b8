"""What an installed wheel must do, in an environment of its own: python .ci/try_wheel.py cpu|cuda|core-only

`core-only` is for environments without torch: the core is loaded and asked for its instruction set.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path


def openmp_runtimes() -> set[str]:
    """The OpenMP libraries in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) > 5}
    return {path for path in paths if "libgomp" in path or "libomp" in path or "libiomp" in path}


def main() -> None:
    """Load the core, and with torch fuse two members of five shared tokens."""
    kind = sys.argv[1]
    # The core first: it must find torch's OpenMP by itself.
    from deepen_ext import _core

    site = Path(_core.__file__).parents[1]
    assert site.name == "site-packages", f"the core is not the installed one: {_core.__file__}"
    assert _core.cuda_compiled() == (kind == "cuda")
    said = [f"Python {platform.python_version()}", f"best instruction set {_core.best_isa()}"]
    if kind != "core-only":
        import torch

        import deepen_ext

        maps = [deepen_ext.RelativeMap.from_dense(torch.eye(5)) for _ in range(2)]
        main_logits = torch.tensor([[2.0, 1.9, 0.0, 0.0, 0.0]])
        assistant = torch.tensor([[0.0, 6.0, 0.0, 0.0, 0.0]])
        fused = deepen_ext.fuse_logits([main_logits, assistant], maps, [0.5, 0.5], learning_rate=0.3)
        assert main_logits.argmax() == 0, main_logits
        assert fused.argmax() == 1, fused
        torch.randn(1000, 1000).softmax(1)
        (runtime,) = openmp_runtimes()
        said += [f"torch {torch.__version__}", f"one OpenMP runtime, {runtime}"]
        if runtime.startswith(str(site)):
            assert runtime.startswith(str(site / "torch")), runtime
    print(f"tried ({kind}): {', '.join(said)}")


if __name__ == "__main__":
    main()
