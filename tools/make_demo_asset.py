"""Builds the garment sheet of the demo data out of Fashion-MNIST.

The sheet ships inside `hjepa_pretrain`, so only people who want to change it run this. Fashion-MNIST is to be had,
among other places, as the Debian package `dataset-fashion-mnist`:

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb fashion
    uv run python tools/make_demo_asset.py fashion/usr/share/datasets/fashion-mnist
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = 10
SIDE = 28
COLUMNS = 80
# Rows of 80 garments a class: the first five are of the published training set, the last one of the published test set.
TRAIN_ROWS = 5
EVAL_ROWS = 1
QUALITY = 60
# Below this grey value a pixel is the faint halo that scaling left around the garments, not garment.
HALO = 10
ASSETS = Path(__file__).parents[1] / "apps/pretrain/src/hjepa_pretrain/demo/assets"


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Reads a gzipped idx file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=dims, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape.astype(np.int64))


def first_of_each_class(folder: Path, split: str, count: int) -> NDArray[np.uint8]:
    """The first `count` garments of every class, [CLASSES, count, SIDE, SIDE]."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return np.stack([images[np.flatnonzero(labels == label)[:count]] for label in range(CLASSES)])


def sheet_of(garments: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lays garments [CLASSES, rows * COLUMNS, SIDE, SIDE] out as one picture, a class below the other."""
    rows = garments.reshape(-1, COLUMNS, SIDE, SIDE)
    return rows.transpose(0, 2, 1, 3).reshape(-1, COLUMNS * SIDE)


def main() -> None:
    """Writes `garments.webp` (grey values, lossy) and `garments_alpha.png` (silhouettes, exact)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that holds train-images-idx3-ubyte.gz and its siblings")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the two pictures go")
    options = parser.parse_args()
    garments = np.concatenate(
        [
            first_of_each_class(options.folder, "train", TRAIN_ROWS * COLUMNS),
            first_of_each_class(options.folder, "t10k", EVAL_ROWS * COLUMNS),
        ],
        axis=1,
    )
    sheet = sheet_of(garments)
    options.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).convert("RGB").save(options.out / "garments.webp", quality=QUALITY, method=6)
    Image.fromarray(sheet >= HALO).save(options.out / "garments_alpha.png", optimize=True)
    for name in ("garments.webp", "garments_alpha.png"):
        print(f"{options.out / name}: {(options.out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
