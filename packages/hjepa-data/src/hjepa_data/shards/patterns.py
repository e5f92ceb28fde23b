"""Shard patterns: braces, globs, directories, list files, URLs and lists become a list of tar files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hjepa_data.errors import DataError, one_line
from hjepa_data.shards.remote import check_url, is_glob, list_remote, shown

__all__ = ["Pattern", "Shard", "expand_locations", "expand_shards"]

Pattern = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
# A local file, or a URL.
Shard = Path | str
# What lists the shards that a URL names; None where URLs are refused.
_Lister = Callable[[str], list[str]] | None

_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_MAX_SHARDS = 10_000_000
# What some reader or shell would run. A bar is refused wherever it stands, the rest unless a file has that name.
_COMMAND = re.compile(r"^\s*(?:pipe|exec|shell|popen)\s*:|\|", re.IGNORECASE)
_LOST_SLASH = re.compile(r"^(?:https?|s3|gs):/[^/]")
_SHELL = re.compile(r"`|\$\(|[<>]\(")
_COMPRESSED = (".gz", ".tgz", ".xz", ".bz2", ".zst")


def expand_shards(pattern: Pattern) -> list[Path]:
    """Expand a pattern of local shards into the shards that it names.

    Args:
        pattern: ``dir/train-{000000..000099}.tar`` (braces), ``dir/*.tar`` (a glob), a directory (its ``*.tar``), a
            text file with one pattern a line (``.txt`` or ``.list``; relative lines are taken from its folder), one tar
            file, or a list of those. Braces in the name of a file or folder that is there are no pattern.

    Returns:
        Paths of tar files in the order of the pattern; globs and directories are sorted.

    Raises:
        DataError: nothing matches, a shard does not exist, a pattern is a command or a URL, or a shard occurs twice.
    """
    return [shard for shard in _expand(pattern, None) if isinstance(shard, Path)]


def expand_locations(pattern: Pattern, lister: Callable[[str], list[str]] = list_remote) -> list[Shard]:
    """Expand a shard pattern into the shards that it names, local or remote.

    Args:
        pattern: what ``expand_shards`` understands, and URLs, also in braces, list files and lists: ``http(s)://``,
            ``s3://`` and ``gs://``, for the latter two also globs and folders that end in ``/``.
        lister: lists the shards that such a glob or folder names.

    Returns:
        Paths and URLs in the order of the pattern. Whether there is a shard at a URL is not asked.

    Raises:
        DataError: as for ``expand_shards``, or a URL is of another scheme, or a glob of files behind http.
    """
    return _expand(pattern, lister)


def _expand(pattern: Pattern, lister: _Lister) -> list[Shard]:
    parts = [pattern] if isinstance(pattern, str | os.PathLike) else list(pattern)
    if not parts:
        raise DataError("no shards: the list of patterns is empty; give a tar file, a glob, braces or a directory")
    try:
        shards = [shard for part in parts for shard in _expand_one(os.path.expanduser(os.fspath(part)), lister)]
    except RecursionError:
        raise DataError(one_line(f"a list file among {pattern!r} names itself; name shards in it")) from None
    seen: set[Shard] = set()
    for shard in shards:
        if shard in seen:
            name = shown(shard) if isinstance(shard, str) else shard
            raise DataError(one_line(f"shard '{name}' is named twice by the pattern: its samples would count double"))
        seen.add(shard)
    return shards


def _expand_one(text: str, lister: _Lister) -> list[Shard]:
    _refuse_commands(text)
    if "://" in text:
        return _expand_url(text, lister)
    if not text:
        raise DataError("a shard pattern is empty; give a tar file, a glob, braces or a directory")
    if _BRACE.search(text, _existing(text)):
        return _expand_braces(text, lister)
    path = Path(text)
    if path.is_dir():
        found = sorted(Path(name) for name in glob.glob(os.path.join(glob.escape(text), "*.tar")))
        if not found:
            raise DataError(f"no *.tar in directory '{text}': {_content(path)}")
        return [_checked(shard) for shard in found]
    if path.is_file():
        return _expand_list(path, lister) if path.suffix in {".txt", ".list"} else [_checked(path)]
    if glob.has_magic(text):
        # A folder that has brackets in its own name is no pattern.
        plain = os.path.join(glob.escape(str(path.parent)), path.name)
        found = sorted(Path(name) for name in glob.glob(text, recursive=True) or glob.glob(plain))
        if not found:
            raise DataError(f"no file matches '{text}': {_nearest(path)}")
        return [_checked(shard) for shard in found]
    if _LOST_SLASH.match(text):
        raise DataError(f"no such shard '{text}': a Path drops a slash of a URL; give URLs as strings")
    raise DataError(f"no such shard '{text}': {_nearest(path)}")


def _expand_url(text: str, lister: _Lister) -> list[Shard]:
    if lister is None:
        raise DataError(
            f"'{shown(text)}': local files only; ShardSource reads URLs, for all else download the shards and give "
            "their path"
        )
    if _BRACE.search(text):
        return [shard for name in _braces(text) for shard in _expand_one(name, lister)]
    check_url(text)
    return [*lister(text)] if is_glob(text) else [text]


def _refuse_commands(text: str) -> None:
    if _COMMAND.search(text) or (_SHELL.search(text) and not os.path.lexists(text)):
        raise DataError(
            one_line(f"'{text}': commands are not run to read shards; download the shards and give their path")
        )


def _expand_braces(text: str, lister: _Lister) -> list[Shard]:
    names = _braces(text, _existing(text))
    for name in names:
        _refuse_commands(name)
    if any(glob.has_magic(name) for name in names):
        return [shard for name in names for shard in _expand_one(name, lister)]
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(names)} shards of '{text}' do not exist, the first is '{missing[0]}': "
            f"{_nearest(Path(missing[0]))}"
        )
    return [_checked(Path(name)) for name in names]


def _existing(text: str) -> int:
    """Return the length of the part of a path that is there as it is written: braces in it are those of a name."""
    while text and not os.path.lexists(text):
        text = os.path.dirname(text)
    return len(text)


def _braces(text: str, start: int = 0) -> list[str]:
    match = _BRACE.search(text, start)
    if match is None:
        return [text]
    body = match.group(1)
    numbers = _RANGE.match(body)
    if numbers:
        first, last = numbers.groups()
        count = int(last) - int(first) + 1
        if not 0 < count <= _MAX_SHARDS:
            raise DataError(f"'{text}': {{{body}}} is no rising range of at most {_MAX_SHARDS} shards")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    elif "," in body:
        choices = body.split(",")
    else:
        raise DataError(f"'{text}': {{{body}}} is no range such as {{000000..000099}} and no list such as {{a,b}}")
    head, tail = text[: match.start()], text[match.end() :]
    return [name for choice in choices for name in _braces(head + choice + tail, start)]


def _expand_list(path: Path, lister: _Lister) -> list[Shard]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(one_line(f"list file '{path}' cannot be read: {error}; write it in UTF-8")) from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"list file '{path}' names no shard; write one pattern a line")
    texts = [line if "://" in line else os.path.join(path.parent, os.path.expanduser(line)) for line in lines]
    for line, text in zip(lines, texts, strict=True):
        # Before its folder is put in front of it.
        for name in [line, *_braces(line, max(0, _existing(text) + len(line) - len(text)))]:
            _refuse_commands(name)
    return [shard for text in texts for shard in _expand_one(text, lister)]


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"'{path}' is a directory, not a shard; '{path}/*.tar' or '{path}' alone names the shards in it"
        )
    if path.suffix in _COMPRESSED:
        raise DataError(f"'{path}' is compressed: samples are read at their offset; unpack it to a plain .tar first")
    return path


def _nearest(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        if folder == folder.parent:
            break
        folder = folder.parent
    # Relative patterns end at '.', which always exists.
    return _content(folder)


def _content(folder: Path) -> str:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"'{folder}' cannot be read ({error.strerror})"
    if not names:
        return f"'{folder}' is empty"
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"'{folder}' holds {len(names)} {'entry' if len(names) == 1 else 'entries'}: {shown}"
