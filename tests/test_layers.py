"""The order of the folders: what `make lint` holds, and what it cannot see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package's sources, beside the rules for them."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "deepen_ext", tmp_path / "deepen_ext", ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("deepen_ext", cache_dir=None)


def lint(folder: Path) -> tuple[int, str]:
    """Exit code and output of `lint-imports` for the package in this folder."""
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result.returncode, result.stdout + result.stderr


def plant(file: Path, line: str) -> None:
    file.write_text(f"{file.read_text()}\n{line}\n")


class TestPlanted:
    """An import that breaks a rule fails the linter, which says where it is."""

    def test_nothing_planted(self, copy: Path) -> None:
        status, output = lint(copy)
        assert status == 0, output

    @pytest.mark.parametrize(
        ("file", "line", "found"),
        [
            (
                "fusers/average.py",
                "from deepen_ext.decoding.loop import Run",
                "deepen_ext.fusers.average -> deepen_ext.decoding.loop",
            ),
            (
                "text/vocabulary.py",  # for typing alone
                "import typing\nif typing.TYPE_CHECKING:\n    from deepen_ext.space import anchors",
                "deepen_ext.text.vocabulary -> deepen_ext.space.anchors",
            ),
            (
                "measure/doctor/diagnose.py",
                "def later():\n    from deepen_ext.members.hf.kv_cache import KVCache",
                "deepen_ext.measure.doctor.diagnose -> deepen_ext.members.hf.kv_cache",
            ),
            (
                "space/anchors.py",
                "from transformers import PreTrainedModel",
                "deepen_ext.space.anchors -> transformers",
            ),
            (
                "ops/checks.py",  # ops/fuse.py imports ops/checks.py
                "from deepen_ext.ops.fuse import fuse",
                "No cycles are allowed in deepen_ext.ops",
            ),
        ],
        ids=["against the order", "for typing", "a backend", "transformers", "a circle"],
    )
    def test_is_found(self, copy: Path, file: str, line: str, found: str) -> None:
        plant(copy / "deepen_ext" / file, line)
        status, output = lint(copy)
        assert status == 1, output
        assert found in output

    def test_a_folder_without_a_rule(self, copy: Path) -> None:
        (copy / "deepen_ext" / "elsewhere").mkdir()
        (copy / "deepen_ext" / "elsewhere" / "__init__.py").touch()
        status, output = lint(copy)
        assert status == 1
        assert "elsewhere" in output


class TestGraph:
    """What the linter's rules leave out."""

    def test_no_circle_of_modules(self, graph: grimp.ImportGraph) -> None:
        """The linter compares a folder's children; here a folder's own `__init__` counts as well."""
        modules = graph.modules - {"deepen_ext"}
        assert len(modules) > 100
        imports = {one: graph.find_modules_directly_imported_by(one) - {"deepen_ext"} for one in modules}
        allowed = {"deepen_ext.adapters.custom_generate"}  # see pyproject.toml
        assert allowed < imports["deepen_ext.ensemble"]
        imports["deepen_ext.ensemble"] -= allowed
        TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules

    def test_what_the_package_itself_is_imported_for(self, graph: grimp.ImportGraph) -> None:
        """Its public names stand above every folder; the compiled core is no module to the linter."""
        lines = {
            details["line_contents"]
            for one in graph.find_modules_that_directly_import("deepen_ext")
            for details in graph.get_import_details(importer=one, imported="deepen_ext")
        }
        assert lines == {"from deepen_ext import _core", "from deepen_ext import __version__"}

    def test_every_backend_is_kept_from_the_folders_above(self) -> None:
        """Each folder of `members/`; the linter cannot know that a new one is missing in its list."""
        rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        (forbidden,) = [one["forbidden_modules"] for one in rules if one["id"] == "backends"]
        folders = (ROOT / "deepen_ext" / "members").glob("*/__init__.py")
        assert set(forbidden) == {f"deepen_ext.members.{one.parent.name}" for one in folders}


@pytest.mark.parametrize(
    "module", ["deepen_ext.fusers", "deepen_ext.fusers.fuse_logits", "deepen_ext.space.relative_map"]
)
def test_a_fusion_step_loads_no_transformers(module: str) -> None:
    program = f"import sys, {module}; assert 'torch' in sys.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_what_asks_for_no_processor_loads_no_modelling_code() -> None:
    """A second of imports, which a process with llama.cpp's members only needs for nothing else."""
    program = """
import sys
from types import SimpleNamespace
import deepen_ext.members.llama_cpp.load
from deepen_ext.ensemble import Ensemble, Settings
main = SimpleNamespace(vocab_size=9, eos_ids={1})
settings = Settings.read(main, max_new_tokens=4, do_sample=False, stop_strings=["."], max_time=9)
assert not settings.processors([2])
slow = {"transformers.generation.utils", "transformers.modeling_utils", "torch._dynamo"}
assert not slow & sys.modules.keys()
assert Settings.read(main, min_new_tokens=2).processors([2])
assert "transformers.generation.utils" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
