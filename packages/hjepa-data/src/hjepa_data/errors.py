"""What the package says to people: one line, with the value, what is allowed and the remedy."""

from __future__ import annotations

from enum import StrEnum
from typing import NoReturn, TypeVar

__all__ = ["DataError", "WorkerError", "choice", "one_line", "refuse"]

Choice = TypeVar("Choice", bound=StrEnum)


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


def choice(kind: type[Choice], field: str, value: str, wrong: str) -> Choice:
    """Read the member of ``kind`` that a field names.

    Args:
        kind: what there is to choose from.
        field: name of the field.
        value: what it holds.
        wrong: what is wrong with a value that is no member.

    Returns:
        The member.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return kind(value)
    except ValueError:
        refuse(field, str(value), wrong, f"allowed: {', '.join(kind)}")


def one_line(text: object) -> str:
    """Join the lines of a message, so that a log shows it whole."""
    return " ".join(str(text).split())
