"""The demo as webdataset shards on the disk, made once and kept."""

import io
import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from hjepa_data import write_shards
from hjepa_pretrain.demo.compose import DemoSet, compose_demo
from hjepa_pretrain.demo.garments import Split

VERSION = 1
TRAIN_COUNT = 20_000
EVAL_COUNT = 4_000
_PER_SHARD = 2_500
_SEED = 2026


def write_demo_shards(
    demo: DemoSet, folder: Path, split: Split | str, *, samples_per_shard: int = _PER_SHARD
) -> list[Path]:
    """Write composites as `<split>-000000.tar` and so on, without loss (PNG), labels beside them."""
    images = ((encode(image), int(label)) for image, label in zip(demo.images, demo.labels, strict=True))
    return write_shards(images, folder, prefix=str(split), samples_per_shard=samples_per_shard)


def encode(image: object) -> bytes:
    """Return the PNG of uint8 pixels; the weakest compression, because it is decoded in every epoch."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)  # type: ignore[arg-type]
    return buffer.getvalue()


def demo_shards(cache: str | None = None, *, train: int = TRAIN_COUNT, evaluation: int = EVAL_COUNT) -> tuple[str, str]:
    """Return the shard patterns of the demo, composing it where the cache does not hold it yet.

    Args:
        cache: folder; None is `$XDG_CACHE_HOME/hjepa` or `~/.cache/hjepa`.
        train: number of training composites.
        evaluation: number of held-out composites.

    Returns:
        Patterns of the training shards and of the held-out ones.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hjepa" if cache is None else Path(cache)
    folder = base.expanduser() / f"demo-v{VERSION}-{train}-{evaluation}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder.parent))
        try:
            write_demo_shards(compose_demo(Split.TRAIN, train, _SEED), aside, "train")
            write_demo_shards(compose_demo(Split.EVAL, evaluation, _SEED), aside, "eval")
            aside.rename(folder)
        except OSError:
            # Another process was first: its folder holds the same bytes.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return str(folder / "train-*.tar"), str(folder / "eval-*.tar")
