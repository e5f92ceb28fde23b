"""The headers of a tar: which file starts at which byte, without reading the files."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["BLOCK", "Member", "scan_tar"]

BLOCK = 512

_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 16
_MAX_LENGTH_DIGITS = 20


@dataclass(kw_only=True, slots=True)
class Member:
    """One file in a tar.

    Attributes:
        name: its path in the tar.
        offset: byte at which its content starts.
        size: bytes of content.
        link: whether it is a link to another file, symbolic or hard, and has no content of its own.
    """

    name: str
    offset: int
    size: int
    link: bool = False


def scan_tar(file: int) -> tuple[list[Member], str | None, int]:
    """List the regular files of a tar, and its links, by its headers.

    Args:
        file: an open file descriptor.

    Returns:
        The complete members, what is wrong with the tar (None if it is whole), and the byte at which reading ended.
    """
    end = os.fstat(file).st_size
    members: list[Member] = []
    position = 0
    override: dict[str, str] = {}
    while True:
        header = os.pread(file, BLOCK, position)
        if len(header) < BLOCK:
            return members, f"is truncated at byte {end}: the end mark of the tar is missing", position
        if header == _ZEROS:
            return members, _joined(file, position), position
        try:
            fits = _checksum_fits(header)
            size = int(override["size"]) if "size" in override else _number(header[124:136])
        except ValueError:
            fits = False
        if not fits or size < 0:
            return members, f"is damaged at byte {position}: that is no tar header", position
        content = position + BLOCK
        if content + size > end:
            name = override.get("path") or _name(header)
            problem = f"is truncated at byte {end}: member '{name}' should end at byte {content + size}"
            return members, problem, position
        kind = header[156:157]
        if kind == b"S" or any(key.startswith("GNU.sparse.") for key in override):
            name = override.get("GNU.sparse.name") or override.get("path") or _name(header)
            return members, f"holds '{name}' without its holes at byte {position}; make it without --sparse", position
        if kind == b"x":
            override |= _pax(os.pread(file, size, content))
        elif kind == b"L":
            override["path"] = os.pread(file, size, content).rstrip(b"\0").decode("utf-8", "backslashreplace")
        elif kind in {b"0", b"\0", b"7", b"1", b"2"}:
            name, link = override.get("path") or _name(header), kind in {b"1", b"2"}
            members.append(Member(name=name, offset=content, size=size, link=link))
            override = {}
        elif kind not in {b"g", b"K"}:
            override = {}
        position = content + (size + BLOCK - 1) // BLOCK * BLOCK


def _joined(file: int, position: int) -> str | None:
    """Look for another tar behind the end mark: ``cat`` joins tars so that readers see the first one only."""
    while chunk := os.pread(file, _CHUNK, position):
        content = chunk.lstrip(b"\0")
        position += len(chunk) - len(content)
        if content:
            header = os.pread(file, BLOCK, position)
            with suppress(ValueError):
                if len(header) == BLOCK and _checksum_fits(header):
                    return f"goes on behind its end mark, with another tar at byte {position}"
            return None
    return None


def _checksum_fits(header: bytes) -> bool:
    return _number(header[148:156]) == sum(header[:148]) + 8 * 32 + sum(header[156:])


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:262] == b"ustar" and header[262:263] == b"\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "backslashreplace")


def _pax(content: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or len(length) > _MAX_LENGTH_DIGITS or int(length) == 0:
            break
        record, content = content[: int(length)], content[int(length) :]
        key, _, value = record[len(length) + 1 : -1].decode("utf-8", "backslashreplace").partition("=")
        found[key] = value
    return found
