"""What docs/gpu.md says of the kernels' registers and shared memory (bench/kernel_resources.py)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))  # at the end: its conftest must not come before this folder's

import gpu_model  # noqa: E402
import kernel_resources  # noqa: E402
import kernel_shared  # noqa: E402
from kernel_resources import KernelUse  # noqa: E402

PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")

# Of nvcc 13.0: one kernel with static shared memory, one that spills, one that has neither.
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6deepen11fuse_kernelILb0ELb1EEEvNS_10FuseParamsENS_12SearchLayoutENS_14SearchScheduleEm' for 'sm_80'
ptxas info    : Function properties for _ZN6deepen11fuse_kernelILb0ELb1EEEvNS_10FuseParamsENS_12SearchLayoutENS_14SearchScheduleEm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 93 registers, used 1 barriers, 1792 bytes smem, 2552 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 983.927 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6deepen49_GLOBAL__N__208ddf54_16_relative_rows_cu_45ae7f9112score_stripsINS_8BFloat16ELi64EEEvNS_18RelativeRowsParamsENS0_5ChunkENS0_4PassEib' for 'sm_90'
ptxas info    : Function properties for _ZN6deepen49_GLOBAL__N__208ddf54_16_relative_rows_cu_45ae7f9112score_stripsINS_8BFloat16ELi64EEEvNS_18RelativeRowsParamsENS0_5ChunkENS0_4PassEib
    32 bytes stack frame, 36 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 32 bytes cumulative stack size
ptxas info    : Compile time = 496.531 ms
ptxas info    : Compiling entry function '_ZN6deepen48_GLOBAL__N__cfa4ce91_15_topk_softmax_cu_0e66a49710topk_mergeENS_17TopkSoftmaxParamsENS0_6LayoutEii' for 'sm_90'
ptxas info    : Function properties for _ZN6deepen48_GLOBAL__N__cfa4ce91_15_topk_softmax_cu_0e66a49710topk_mergeENS_17TopkSoftmaxParamsENS0_6LayoutEii
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compile time = 453.981 ms
"""  # noqa: E501


def test_a_log_of_ptxas_is_read() -> None:
    assert kernel_resources.parse(LOG) == [
        KernelUse("fuse_kernel<false, true>", "sm_80", 93, 0, 0, 0, 1792),
        KernelUse("score_strips<BFloat16, 64>", "sm_90", 128, 32, 36, 40, 0),
        KernelUse("topk_merge", "sm_90", 40, 0, 0, 0, 0),
    ]


def test_a_log_cut_short_is_no_result() -> None:
    with pytest.raises(AssertionError, match="ptxas said nothing of"):
        kernel_resources.parse("\n".join(LOG.splitlines()[:-2]))


def table(name: str) -> str:
    match = re.search(rf"<!-- {name}:begin -->\n(.*)\n<!-- {name}:end -->", PAGE, re.DOTALL)
    assert match, f"docs/gpu.md has no {name} table"
    return match[1]


def test_the_page_has_every_kernel() -> None:
    sources = "".join(file.read_text() for file in (ROOT / "csrc").rglob("*.cu*"))
    kernels = set(re.findall(r"__global__ (?:static )?void(?: __launch_bounds__\(.*?\))?\s+(\w+)\(", sources))
    assert len(kernels) >= 10, "the pattern finds no kernels"
    assert set(re.findall(r"^\| `(\w+)", table("kernels"), re.MULTILINE)) == kernels, (
        "run python bench/kernel_resources.py"
    )


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return kernel_shared.measure()


@pytest.mark.slow
def test_the_page_has_the_shared_memory_that_is_asked_for(measured: dict[str, Any]) -> None:
    assert kernel_resources.shared_table(measured) == table("shared"), "run python bench/kernel_resources.py"


@pytest.mark.slow
def test_no_block_asks_for_more_than_there_is(measured: dict[str, Any]) -> None:
    for architecture, found in measured.items():
        for step in found["step"].values():
            assert {"fuse_kernel"} < set(step)
            assert max(step.values()) <= kernel_shared.LIMITS[architecture]
        assert found["largest_k"] < kernel_shared.LARGEST_K, "look further"


class TestModel:
    def test_the_page_has_its_tables(self) -> None:
        card = gpu_model.CARDS["H200"]
        found = gpu_model.measured(ROOT / "bench" / "results", "H200")
        assert table("model") == f"{gpu_model.table(card, found)}\n\n{gpu_model.chains(card)}", (
            "run python bench/gpu_model.py"
        )

    def test_its_kernels_are_the_cores(self) -> None:
        sources = "".join(file.read_text() for file in (ROOT / "csrc").rglob("*.cu*"))
        names = {kernel.name for _, kernels in gpu_model.cases(gpu_model.CARDS["H100"]) for kernel in kernels}
        assert names == {name for name in names if f" {name}(" in sources}, "count the kernels anew"

    def test_figures_stand_beside_the_case_of_their_name(self, tmp_path: Path) -> None:
        name = "topk_softmax, V 262,144, k 128, float32, B 1"
        figures = [
            {"name": f"{name}, {way} L2", "value": value, "unit": "µs"}
            for way, value in (("warm", 12.34), ("cold", 56.78))
        ]
        for file, card, scale in (("a.json", "NVIDIA A100", 2), ("h.json", "NVIDIA H100 80GB HBM3", 1)):
            group = [one | {"value": scale * one["value"]} for one in figures]
            content = {
                "machine": {"gpu": {"name": card}},
                "figures": {"gpu": group},
                "commit": f"of {file}, cut",
            }
            (tmp_path / file).write_text(json.dumps(content))
        found = gpu_model.measured(tmp_path, "H100")
        (line,) = [
            one
            for one in gpu_model.table(gpu_model.CARDS["H100"], found).splitlines()
            if f"| {name} |" in one
        ]
        assert "measured at of h.json," in gpu_model.table(gpu_model.CARDS["H100"], found)
        cells = line.split("|")
        assert cells[4].strip().startswith("12.3, ")
        assert cells[6].strip().startswith("56.8, ")
        assert gpu_model.measured(tmp_path, "4090") == {}

    @pytest.mark.parametrize("cold", [False, True])
    def test_no_estimate_is_below_the_bytes_or_the_chain(self, cold: bool) -> None:
        card = gpu_model.CARDS["H100"]
        for name, kernels in gpu_model.cases(card):
            estimate = gpu_model.estimate_us(kernels, card, cold=cold)[0]
            chain = sum(gpu_model.step_us(step, card, cold=cold) for one in kernels for step in one.chain)
            rate = 1e6 * (card.memory_tb_s if cold else card.l2_tb_s)
            least = max(chain, sum(one.bytes for one in kernels) / rate) + len(kernels) * gpu_model.BETWEEN_US
            assert estimate > 0.9999 * least, name  # a sum rounds


@pytest.mark.slow
@pytest.mark.parametrize("architecture", kernel_shared.LIMITS)
def test_the_default_step_fits_shared_memory(measured: dict[str, Any], architecture: str) -> None:
    found = measured[architecture]
    assert all(step["fuse_kernel"] > 0 for step in found["step"].values()), "the search is in the workspace"
    assert found["largest_k"] >= kernel_shared.K
