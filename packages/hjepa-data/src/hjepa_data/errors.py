"""What the package says to people: one line, with the value, what is allowed and the remedy."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["DataError", "WorkerError", "one_line", "refuse"]


class DataError(ValueError):
    """A problem of the data that its owner can mend: a missing shard, a damaged file, a wrong pattern."""


class WorkerError(RuntimeError):
    """A loader's worker process ended although nobody asked it to."""


def refuse(field: str, value: object, wrong: str, allowed: str) -> NoReturn:
    """Raise the one-line ``ValueError`` of a configuration field.

    Args:
        field: name of the field.
        value: what it holds.
        wrong: what is wrong with it.
        allowed: what is allowed, or the remedy.

    Raises:
        ValueError: always.
    """
    raise ValueError(one_line(f"{field}={value!r}: {wrong}; {allowed}"))


def one_line(text: object) -> str:
    """Join the lines of a message, so that a log shows it whole."""
    return " ".join(str(text).split())
