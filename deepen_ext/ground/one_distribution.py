"""deepen-ext, and deepen-ext-cu13 with the CUDA part, hold the same package: one of them may be installed."""

from __future__ import annotations

import re
from pathlib import Path

from deepen_ext.errors import InputError

_NAMES = re.compile(r"deepen-ext(-cu\d+)?")  # those that .ci/release gives; others' packages may begin so too


def check_one_distribution(site: Path) -> None:
    """Refuse an installation in which pip wrote one distribution's files over the other's.

    Args:
        site: the folder that holds the package `deepen_ext`.

    Raises:
        InputError: two distributions of it are installed there.
    """
    found = {path.name.partition("-")[0].replace("_", "-") for path in site.glob("deepen_ext*.dist-info")}
    names = {name for name in found if _NAMES.fullmatch(name)}
    if len(names) > 1:
        both = " and ".join(sorted(names))
        raise InputError(
            f"{both} are both installed in {site}, and each overwrites the other's files; "
            f"run `pip uninstall {' '.join(sorted(names))}`, then install the one that you want"
        )
