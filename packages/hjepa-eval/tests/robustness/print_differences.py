"""How far corruptions are from those of the package imagecorruptions, whose statistics make_reference.py wrote.

python packages/hjepa-eval/tests/robustness/print_differences.py [--draws 48]
"""

import argparse
import json
from pathlib import Path

import torch

from hjepa_eval.robustness.corrupt import corrupt
from hjepa_eval.robustness.severity import SEVERITIES, Corruption

REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())


def main() -> None:
    """Print the largest differences over the severities, one line a corruption."""
    from make_reference import picture, statistics  # beside this file, where only a script finds it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=48, help="changed pictures (default 48)")
    parser.add_argument("--only", nargs="+", choices=list(Corruption), default=list(Corruption), help="some of the 15")
    given = parser.parse_args()
    image = picture()
    images = torch.from_numpy(image).permute(2, 0, 1).expand(given.draws, -1, -1, -1)
    print(f"{'largest of 5 severities':<24}{'mean, levels':>14}{'change, %':>11}{'deviation, %':>14}")
    for name in given.only:
        rows = []
        for severity in SEVERITIES:
            expected = REFERENCE.get(f"{name}/{severity}")
            if expected is not None:
                changed = corrupt(images, name, severity, strength="imagenet").permute(0, 2, 3, 1).numpy()
                found = statistics(changed, image)
                shares = (100 * abs(found[key] / expected[key] - 1) for key in ("change", "deviation"))
                rows.append((abs(found["mean"] - expected["mean"]), *shares))
        if rows:
            mean, change, deviation = (max(column) for column in zip(*rows, strict=True))
            print(f"{name:<24}{mean:>14.3f}{change:>11.2f}{deviation:>14.2f}")


if __name__ == "__main__":
    main()
