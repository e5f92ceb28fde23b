"""Check, from inside an environment, that it holds one package and its closure, and that they come from wheels.

    python tools/check_isolated.py --present hjepa-models --absent hjepa-data hjepa-train

Standard library only. Every console script of the packages that are present is loaded too: a script that needs an
undeclared dependency, or points at nothing, fails here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import sysconfig
from pathlib import Path


def problems(present: list[str], absent: list[str]) -> list[str]:
    """Return one line for each thing that is not as it should be."""
    site = Path(sysconfig.get_path("purelib")).resolve()
    found = []
    for name in present:
        spec = importlib.util.find_spec(name.replace("-", "_"))
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or site not in origin.parents:
            found.append(f"{name}: should be installed in {site}, is at {origin}")
            continue
        for script in importlib.metadata.distribution(name).entry_points.select(group="console_scripts"):
            try:
                script.load()
            except (ImportError, AttributeError) as error:
                found.append(f"{name}: script {script.name} = {script.value} does not load: {error}")
    found += [f"{name}: should be absent" for name in absent if importlib.util.find_spec(name.replace("-", "_"))]
    return found


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--present", nargs="+", required=True, help="packages that must be installed from wheels")
    parser.add_argument("--absent", nargs="*", default=[], help="packages that must not be importable")
    arguments = parser.parse_args()
    found = problems(arguments.present, arguments.absent)
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
