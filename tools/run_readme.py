"""Run the python examples of a README, as a reader would: top to bottom, in one interpreter.

    python tools/run_readme.py packages/hjepa-models/README.md

Every fenced block that opens with ```python runs, in one namespace, in the order of the page. Standard library only, so
that it runs in an environment that holds nothing but the package.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Return each python block of a page with the number of the line that it begins on."""
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in BLOCK.finditer(text)]


def run(path: Path) -> int:
    """Run the examples of one page and return how many there were."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = python_blocks(path.read_text())
    for line, source in blocks:
        # Empty lines put the block where it stands on the page, so that a traceback names the page's own line.
        exec(compile("\n" * (line - 1) + source, str(path), "exec"), namespace)
    return len(blocks)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(f"{run(Path(each))} examples of {each} ran", flush=True)
