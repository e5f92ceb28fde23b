"""Fail where torch sees no CUDA device, so that tests that were asked to run on one cannot pass without it."""

from __future__ import annotations

import sys

import torch

if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("device='cuda' was asked for and torch sees no CUDA device; run device='cpu', or check the driver")
    print(f"CUDA device: {torch.cuda.get_device_name()}")
