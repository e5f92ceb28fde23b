"""Errors that a user may meet, each one line: what, where, what is allowed, the remedy."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

Choice = TypeVar("Choice", bound=StrEnum)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or that is of another model or optimizer."""


class TrainingError(RuntimeError):
    """A run that cannot go on: a loss that is not finite, a stream that ends, a collapse with policy `stop`."""


class UnstableError(TrainingError):
    """A run that would only do it again: the same command is not to be started again unseen."""


class CollapseError(UnstableError):
    """The embeddings have collapsed and the policy of the monitor is `stop`."""


class DivergedError(UnstableError):
    """Too many steps in a row had a loss or a gradient that is not finite, or a spike."""


def choice(kind: type[Choice], field: str, value: str) -> Choice:
    """Return the member of `kind` named by `value`; raise a ValueError that lists what is allowed."""
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.value for member in kind)
        raise ValueError(f"{field}={value}: unknown; allowed: {allowed}") from None


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
