"""Files that survive a crash: written, flushed to the disk, hashed and described in a manifest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


class DamagedError(Exception):
    """A checkpoint directory that is not what its manifest says."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; floats keep every bit, what is no JSON is refused."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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


def write_manifest(folder: Path, model: dict[str, list[int]]) -> None:
    """Describe the files of a folder (size, SHA-256) and the model that they belong to, and flush all of it."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files, "model": model})
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Return the manifest of a folder; `verify` reads every file and checks it.

    Raises:
        DamagedError: Where a file is missing, shorter or different.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST}: not of format {FORMAT}")
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("model"), dict):
        raise DamagedError(f"{MANIFEST}: names no files or no model")
    for name, expected in manifest["files"].items() if verify else ():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise DamagedError(f"{name} has {size} bytes of {expected['size']}")
        if _sha256(path) != expected["sha256"]:
            raise DamagedError(f"{name} has another SHA-256 than its manifest")
    return manifest


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file at once: readers see the old one or the new one."""
    aside = path.with_name(f".tmp-{path.name}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
