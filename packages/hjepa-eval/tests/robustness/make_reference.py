"""Statistics of the public package imagecorruptions on one drawn picture, for test_corrupt.py.

uv run --no-project --python 3.10 --with 'imagecorruptions==1.1.2' --with 'numpy<1.24' --with 'scikit-image==0.19.3' \
    --with 'scipy<1.12' --with 'setuptools<80' python make_reference.py > reference.json
"""

import json

import numpy as np

SIDE, CELLS, DRAWS = 64, 4, 128


def picture(number: int = 0) -> np.ndarray:
    """Waves, ramps and a disk, uint8 [64, 64, 3]: edges, smooth parts and colours."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    red = 0.5 + 0.4 * np.sin(2 * np.pi * (3 * x + 2 * y + 0.1 * number))
    green = 0.15 + 0.7 * x
    blue = 0.5 + 0.3 * np.cos(2 * np.pi * 5 * y * (0.5 + x))
    grain = 0.04 * np.sin(97 * x + 61 * y + 40 * x * y)
    disk = (x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.05
    image = np.stack([np.where(disk, 0.9, red), np.where(disk, 0.2, green), np.where(disk, 0.3, blue)], axis=-1)
    return np.round(255 * np.clip(image + grain[..., None], 0, 1)).astype(np.uint8)


def statistics(changed: np.ndarray, image: np.ndarray) -> dict[str, object]:
    """Mean, deviation, mean change, and the means of 4x4 cells in each channel."""
    values = changed.astype(float)
    cells = values.reshape(-1, CELLS, SIDE // CELLS, CELLS, SIDE // CELLS, 3).mean((0, 2, 4))
    return {
        "mean": round(values.mean(), 3),
        "deviation": round(np.mean([one.std() for one in values]), 3),
        "change": round(np.abs(values - image).mean(), 3),
        "cells": cells.round(2).flatten().tolist(),
    }


def main() -> None:
    """Print the statistics as JSON: one draw of what is not random, several of what is."""
    from imagecorruptions import corrupt, get_corruption_names

    image = picture()
    found = {}
    for name in get_corruption_names():
        # Its elastic transform is not that of ImageNet-C.
        if name == "elastic_transform":
            continue
        for severity in range(1, 6):
            np.random.seed(severity)  # noqa: NPY002 - what the package draws from
            changed = [corrupt(image, corruption_name=name, severity=severity) for _ in range(DRAWS)]
            found[f"{name}/{severity}"] = statistics(np.stack(changed), image)
    print(json.dumps(found, indent=None, separators=(",", ":")).replace('},"', '},\n"'))


if __name__ == "__main__":
    main()
