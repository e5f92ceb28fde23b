"""Lengths of time as people write them."""

import re

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str, name: str) -> float:
    """Returns the seconds of a length of time such as `170`, `90s`, `3m`, `1h30m` or `2d`.

    Args:
        text: the length of time.
        name: of the setting that it is given to.

    Raises:
        ValueError: the text is no length of time, or is not longer than nothing.

    >>> seconds("1h30m", "run.time_limit"), seconds("170", "run.time_limit")
    (5400.0, 170.0)
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        total = float(text)
    elif re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", text))
    else:
        raise ValueError(
            f"{name}={text}: no length of time; allowed: seconds or units, as in 170, 90s, 3m or 1h30m, or null"
        )
    if total <= 0:
        raise ValueError(f"{name}={text}: no time at all; allowed: above 0, or null")
    return total
