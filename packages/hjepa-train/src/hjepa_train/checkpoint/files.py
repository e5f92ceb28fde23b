"""Files that survive a crash: written, flushed to the disk, hashed and described in a manifest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from hjepa_train.errors import one_line

MANIFEST = "manifest.json"
FORMAT = 2


class Written(NamedTuple):
    """Size and SHA-256 of a file."""

    size: int
    sha256: str


class DamagedError(Exception):
    """A checkpoint directory that is not what its manifest says."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON and flush it to the disk; floats keep every bit, what is no JSON is refused."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise DamagedError where that fails."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path.name}: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path.name}: no JSON object")
    return content


def sync(path: Path) -> None:
    """Wait until a file or the entries of a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, model: dict[str, list[int]], files: dict[str, Written]) -> None:
    """Say what stands in a folder (size and SHA-256 of each file) and to which model it belongs."""
    names = {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": names, "model": model})
    sync(folder)


def read_manifest(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Return the manifest of a folder whose files are there and as long as it says; `verify` reads them all too.

    Raises:
        DamagedError: Where a file is missing, shorter or different.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST}: not of format {FORMAT}")
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("model"), dict):
        raise DamagedError(f"{MANIFEST}: names no files or no model")
    for name, expected in manifest["files"].items():
        if not isinstance(expected, dict) or not {"size", "sha256"} <= expected.keys():
            raise DamagedError(f"{MANIFEST}: does not say what {name} holds")
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise DamagedError(f"{name} has {size} bytes of {expected['size']}")
        if not verify:
            continue
        try:
            digest = describe(path).sha256
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {one_line(error)}") from error
        if digest != expected["sha256"]:
            raise DamagedError(f"{name} has another SHA-256 than its manifest")
    return manifest


def describe(path: Path) -> Written:
    """Read a file and return its size and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Written(file.tell(), digest)


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file at once: readers see the old one or the new one."""
    aside = path.with_name(f".tmp-{path.name}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)
    sync(path.parent)
