"""Fixtures: the device under test, and small shards of real JPEG bytes."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa_data import write_shards

# A CI machine shares its cores; the limits of hypothesis on time would only report that.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def device():
    name = os.environ.get("HJEPA_TEST_DEVICE", "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.fail(f"HJEPA_TEST_DEVICE={name}, but there is no CUDA device")
    # A GPU's convolutions are compared with exact sums.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


class Launches(TorchDispatchMode):
    """Count the operators that launch a kernel on a GPU: all but views and memory that is not yet filled."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.number += not (func.is_view or name in {"_unsafe_view", "empty", "empty_like", "new_empty"})
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def launches():
    """Count the kernels that a call launches once its constants are in place."""

    def count(call):
        call()
        with Launches() as mode:
            call()
        return mode.number

    return count


def encode(number, size=(40, 32), kind="JPEG"):
    """Encode an image (height, width) whose content depends on its number."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Six shards of 53 samples in all; labels are number % 7."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards([(encode(n), n % 7) for n in range(53)], folder, samples_per_shard=10)
    return folder


@pytest.fixture(scope="session")
def jpeg():
    return encode
