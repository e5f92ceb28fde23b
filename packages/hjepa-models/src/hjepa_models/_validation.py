"""Small helpers with which configs check themselves and speak in one line."""

import difflib
import math
from collections.abc import Iterable
from enum import StrEnum
from typing import TypeVar

E = TypeVar("E", bound=StrEnum)
T = TypeVar("T")

_MOST_HEADS = 1024  # that are proposed


def coerce_choice(enum: type[E], field: str, value: str) -> E:
    """Return the member of `enum` named by `value`, or refuse with the allowed names."""
    if isinstance(value, enum):
        return value  # torch 2.11 cannot trace the call of an enum in a compiled step
    try:
        return enum(value)
    except ValueError:
        raise ValueError(
            f"{field}={value!r}: unknown choice; allowed: {', '.join(enum)}{suggestion(str(value), enum)}"
        ) from None


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """Return '; did you mean ...?' for the allowed name nearest to `name`, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {str(near[0])!r}?" if near else ""


def check_positive(**fields: float) -> None:
    """Refuse the first field that is not above 0, or infinite."""
    for field, value in fields.items():
        if not 0 < value < math.inf:  # so that what is no number is refused too
            raise ValueError(f"{field}={value}: must be above 0; allowed: > 0 and finite; give a positive number")


def check_not_negative(**fields: float) -> None:
    """Refuse the first field that is below 0."""
    for field, value in fields.items():
        if not value >= 0:
            raise ValueError(f"{field}={value}: must not be negative; allowed: >= 0; use 0 to switch it off")


def check_drop_path(owner: str, drop_path: float) -> None:
    """Refuse a rate at which everything would be dropped."""
    if not 0 <= drop_path < 1:
        raise ValueError(f"{owner}={drop_path}: no rate of what is dropped; allowed: 0 to below 1; use e.g. 0.1")


def as_tuple(field: str, values: Iterable[T]) -> tuple[T, ...]:
    """Return what a sequence holds as a tuple, or refuse a single value."""
    if isinstance(values, Iterable) and not isinstance(values, str):
        return tuple(values)
    raise ValueError(f"{field}={values!r}: no sequence; allowed: e.g. ({values}, {values}); give one value per entry")


def check_axes(field: str, sizes: Iterable[int]) -> tuple[int, ...]:
    """Return `sizes` as a tuple after checking that it names at least one axis and every size is a positive integer."""
    sizes = as_tuple(field, sizes)
    if not sizes or any(not isinstance(size, int) or size <= 0 for size in sizes):
        raise ValueError(
            f"{field}={sizes}: needs one positive size per axis, an integer; allowed: e.g. (14, 14); correct the sizes"
        )
    return sizes


def check_heads(owner: str, embed_dim: int, num_heads: int, name: str = "num_heads") -> None:
    """Refuse a width that the heads do not divide evenly."""
    if embed_dim % num_heads:
        most = min(embed_dim // 8, _MOST_HEADS)
        allowed = [1, *(heads for heads in range(2, most + 1) if embed_dim % heads == 0)]
        raise ValueError(
            f"{owner}.{name}={num_heads}: does not divide embed_dim={embed_dim}; "
            f"allowed: {', '.join(map(str, allowed[:16]))}; change {name} or embed_dim"
        )
