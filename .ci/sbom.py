"""The software bill of materials of one distribution, CycloneDX 1.6, beside its wheels.

python .ci/sbom.py PYTHON SOURCE OUTPUT [--cudart VERSION]

It lists what pip installed for the wheel in the environment of PYTHON (the run-time dependencies, at the
versions that were tried), and what is compiled into the core: pybind11's headers, and with CUDA NVIDIA's
static run time. SOURCE is the folder with the distribution's pyproject.toml. Run it in the environment of
release-tools.txt.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parents[1]


def compiled_in(cudart: str | None) -> list[dict[str, Any]]:
    """The components of others that are part of the core's file; `cudart`: the version of CUDA's run time."""
    pin = re.search(r"^pybind11==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None, "constraints.txt does not pin pybind11"
    parts = [("pybind11", pin[1], {"id": "BSD-3-Clause"}, f"pkg:pypi/pybind11@{pin[1]}")]
    if cudart:
        licence = {"name": "NVIDIA CUDA Toolkit EULA"}
        parts.append(("cudart_static", cudart, licence, f"pkg:generic/nvidia/cudart_static@{cudart}"))
    return [
        {
            "type": "library",
            "bom-ref": f"compiled-in:{name}",
            "name": name,
            "version": version,
            "licenses": [{"license": licence}],
            "purl": purl,
            "description": "compiled into the core, deepen_ext/_core",
        }
        for name, version, licence, purl in parts
    ]


def main() -> None:
    """Write the file, or end with what is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("python")
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cudart")
    asked = parser.parse_args()
    made = subprocess.run(
        [
            *(sys.executable, "-m", "cyclonedx_py", "environment", asked.python),
            *("--pyproject", str(asked.source / "pyproject.toml"), "--mc-type", "library"),
            *("--spec-version", "1.6", "--output-format", "JSON", "--output-reproducible"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    bom = json.loads(made.stdout)
    root = bom["metadata"]["component"]
    # The wheel itself is the subject, not one of its parts; pip belongs to the environment.
    dropped = {one["bom-ref"] for one in bom["components"] if one["name"] == "pip" or "deepen" in one["name"]}
    bom["components"] = [one for one in bom["components"] if one["bom-ref"] not in dropped]
    bom["dependencies"] = [one for one in bom["dependencies"] if one["ref"] not in dropped]
    for one in bom["dependencies"]:
        one["dependsOn"] = [ref for ref in one.get("dependsOn", []) if ref not in dropped]
    parts = compiled_in(asked.cudart)
    bom["components"] += parts
    bom["dependencies"] += [{"ref": part["bom-ref"]} for part in parts]
    (of_root,) = (one for one in bom["dependencies"] if one["ref"] == root["bom-ref"])
    of_root["dependsOn"] += [part["bom-ref"] for part in parts]
    text = json.dumps(bom, indent=2) + "\n"
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        raise SystemExit(f"sbom.py: what was made is no CycloneDX 1.6: {wrong}")
    asked.output.write_text(text, encoding="utf-8")
    print(f"{asked.output}: {root['name']} {root['version']}, {len(bom['components'])} components")


if __name__ == "__main__":
    main()
