"""Weights of 8 bits: the linear maps of a model kept as integers, multiplied with activations of full precision."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hjepa_models.layers.flexi import FlexiPatchEmbed

M = TypeVar("M", bound=nn.Module)


def quantize_int8(module: M) -> M:
    r"""Return a copy whose linear maps keep their weights in 8 bits; needs the extra `int8`.

    Each output row $o$ of a weight $W$ has one scale, symmetric about 0, and biases stay as they are:

    $$W_{oi} \approx s_o q_{oi}, \qquad s_o = \max_i |W_{oi}| / 127.5, \qquad q_{oi} \in \{-128, \ldots, 127\}$$

    Nothing is calibrated and activations are not touched, so that a copy needs no data. It is for inference: save the
    original, and quantise after loading. A `FlexiPatchEmbed` stays as it is, since its weights are resized as floats.

    Args:
        module: an HJEPA, an Encoder, or any module with `nn.Linear` inside; unchanged. Both branches of an HJEPA are
            quantised.

    Returns:
        The copy, in the mode of the original.

    Raises:
        ValueError: where torchao is not installed, or the module has no linear map in floating point.
    """
    quantize = _weight_only_int8()
    names = _linear_names(module)
    if not names:
        raise ValueError(
            f"module={type(module).__name__}: has no linear map in floating point; "
            "allowed: a model that is not quantised yet; quantise the original"
        )
    copied = copy.deepcopy(module)
    quantize(copied, names)
    return copied


def weight_bytes(module: nn.Module) -> int:
    """Return how many bytes the parameters and buffers of a module hold; scales of quantised weights count too.

    >>> weight_bytes(nn.Linear(8, 4))  # (8 * 4 + 4) * 4
    144
    """
    tensors = chain(module.parameters(), module.buffers())
    return sum(part.numel() * part.element_size() for tensor in tensors for part in _parts(tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor is made of."""
    if not _is_composed(tensor):
        yield tensor
        return
    names, _ = cast(Any, tensor).__tensor_flatten__()
    for name in names:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):
            yield from _parts(part)


def _is_composed(tensor: Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def _linear_names(module: nn.Module) -> frozenset[str]:
    """Return the names of the linear maps in floating point whose weights nothing reads but their own call."""
    children = dict(module.named_modules())
    linear = {name for name, one in children.items() if isinstance(one, nn.Linear) and not _is_composed(one.weight)}
    resized = {f"{name}.proj".lstrip(".") for name, one in children.items() if isinstance(one, FlexiPatchEmbed)}
    return frozenset(linear - resized)


def _weight_only_int8() -> Callable[[nn.Module, frozenset[str]], None]:
    """Return what quantises the named parts of a module in place, or refuse where torchao is not there."""
    if find_spec("torchao") is None:
        raise ValueError(
            "package='torchao': not installed, quantisation needs it; allowed: the extra `int8`; "
            "pip install 'hjepa-models[int8]'"
        )
    # What torchao's import says is for its authors: an escape sequence in a docstring, a call that torch will retire.
    pytree = logging.getLogger("torch.utils._pytree")
    level = pytree.level
    pytree.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="invalid escape sequence")
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    finally:
        pytree.setLevel(level)
    # Settings of the compiler are global; they are the caller's.
    config = Int8WeightOnlyConfig(set_inductor_config=False)

    def quantize(module: nn.Module, names: frozenset[str]) -> None:
        with torch.no_grad():
            quantize_(module, config, filter_fn=lambda _, name: name in names)

    return quantize
