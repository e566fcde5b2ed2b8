"""kill -9 at every write: what is read afterwards is whole, old or made anew. DEEPEN_KILLS=1000 for more.

`make kills` runs 1,000 of each and prints the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kills import TESTS

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("DEEPEN_KILLS", "3"))
NAMES = (
    *("preset", "relative map", "conversion", "results", "tokenizer", "embedded model", "embedded link"),
    *("trace", "trace page", "plot"),
)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `kills.py` counts. A process of its own: a process that has used threads cannot be forked."""
    file = tmp_path_factory.mktemp("kills") / "counts.json"
    command = [sys.executable, str(TESTS / "faults" / "kills.py"), "--kills", str(KILLS), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr
    return dict(json.loads(file.read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_half(counts: dict[str, Any], name: str) -> None:
    assert list(counts) == list(NAMES)
    one = counts[name]
    assert not one["found"].get("half"), "\n".join(one["errors"])
    assert sum(one["found"].values()) == sum(one["when"].values()) == one["kills"] == KILLS
    assert one["steps"] >= 2


def test_the_kills_meet_the_writes(counts: dict[str, Any]) -> None:
    during = [one["when"].get("during", 0) for one in counts.values()]
    assert sum(during) >= len(NAMES)
    assert all(during) or KILLS < 100


def test_a_write_that_is_not_whole_is_found(tmp_path: Path) -> None:
    """The plain write, which `plots/output_file.py` had, is told from the whole one."""
    program = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[1:]\n"
        "from kills import kill_many\n"
        "from half import Plain\n"
        f"print(kill_many(Plain(), 30, Path({str(tmp_path)!r}), 0)['found']['half'])\n"
    )
    plain = (
        "import time\nclass Plain:\n"
        "    name = 'plain'\n"
        "    def prepare(self, shared): pass\n"
        "    def put(self, place, text):\n"
        "        with open(place / 'file', 'w') as file:\n"
        "            for _ in range(50): file.write(text); file.flush(); time.sleep(1e-3)\n"
        "    def before(self, place): self.put(place, 'old')\n"
        "    def write(self, place): self.put(place, 'new')\n"
        "    def read(self, place):\n"
        "        text = (place / 'file').read_text()\n"
        "        return {'old' * 50: 'old', 'new' * 50: 'new'}[text]\n"
    )
    (tmp_path / "half.py").write_text(plain)
    done = subprocess.run(
        [sys.executable, "-c", program, str(TESTS / "faults"), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
