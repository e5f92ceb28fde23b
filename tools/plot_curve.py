"""Draw the accuracy of a run on the way: `python tools/plot_curve.py runs/NAME docs/images/demo.svg`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hjepa_pretrain.report.figures import curves


def main(run_dir: Path, output: Path) -> None:
    """Write the kNN curves of a run, of its mean token and of what its top pools, as an SVG.

    Args:
        run_dir: Folder of a run, with `metrics.jsonl`.
        output: The picture.
    """
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = sorted({key for row in rows for key in row if key.startswith(("eval/encoder/knn_", "eval/pooled/knn_"))})
    picture = curves(rows, keys, "kNN accuracy on held-out composites")
    if picture is None:
        raise SystemExit(f"{run_dir}: no row of metrics.jsonl has a measurement; set eval.every_steps")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(picture)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
