"""Arithmetic of the forward pass: float32, or bfloat16 under autocast with float32 weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import StrEnum

import torch


class Precision(StrEnum):
    """`bf16` has the exponent of float32, so that no gradient scaler is needed."""

    bf16 = "bf16"
    fp32 = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """The type of tensors."""
        return torch.bfloat16 if self is Precision.bf16 else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass; weights, gradients, optimizer and EMA stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is Precision.bf16)
