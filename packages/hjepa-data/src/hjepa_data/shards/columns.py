"""Arrays that all processes share: millions of rows, held once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["SharedArrays"]


class SharedArrays:
    """Named arrays: plain ones here, and shared memory on the way to another process.

    Args:
        arrays: by name.
    """

    def __init__(self, **arrays: np.ndarray[Any, Any]) -> None:
        self._arrays = arrays
        self._shared: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Tensor]:
        # Tensors reach worker processes as handles, arrays as copies; the handles live as long as these tensors do.
        if not self._shared:
            self._shared = {name: torch.from_numpy(array).clone() for name, array in self._arrays.items()}
        return self._shared

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        self._shared = state
        self._arrays = {name: tensor.numpy() for name, tensor in state.items()}
