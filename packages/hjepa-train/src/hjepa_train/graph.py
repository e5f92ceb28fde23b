"""What happens to a module before it is spread: activations computed again, products of 8 bits, then compilation."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hjepa_train.extra import require
from hjepa_train.protocols import Compilable


class CompileMode(StrEnum):
    """What the compiler spends time on."""

    default = "default"
    reduce_overhead = "reduce_overhead"
    max_autotune = "max_autotune"


def recompute_activations(module: nn.Module, names: Sequence[str]) -> None:
    """Let blocks keep their inputs alone and run again in the backward pass: less memory, a third more arithmetic.

    Args:
        module: The trained module; what is without gradient (a target branch) stays as it is.
        names: Classes of the blocks, without their module.

    Raises:
        ValueError: Where the module has no such block.

    Source: Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174, section 3.
    """
    classes = {type(child).__name__ for child in module.modules()}
    for name in names:
        if name not in classes:
            raise ValueError(f"recompute={name}: no such block in the model; allowed: {', '.join(sorted(classes))}")
    for child in module.modules():
        if type(child).__name__ in names:
            child.forward = functools.partial(_recomputed, child.forward)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:  # noqa: ANN401
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)


def multiply_in_fp8(module: nn.Module, blocks: Sequence[type[nn.Module]]) -> None:
    """Let the linear maps of blocks multiply in 8-bit floats, forward and backward; weights stay as they are.

    Each tensor has one scale, from its largest value at this step, so that the state is that of the plain module.

    Args:
        module: The trained module, on its device; on a CPU the rounding is emulated, which is slow.
        blocks: Classes of blocks; maps whose sides are no multiples of 16 are left alone.

    Raises:
        ValueError: Where torchao is not installed, the GPU has no such products, or no map has such sides.

    Source: Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433, section 3; torchao.float8.
    """
    require("torchao", "fp8=true", "hjepa-train[fp8]")
    device = next(module.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"fp8=true: {name} has no products of 8 bits; allowed: GPUs of capability 8.9 and more")
    convert, config = _float8(emulate=device.type == "cpu")
    fits = {
        child
        for block in _outermost(module, tuple(blocks))
        for child in block.modules()
        if isinstance(child, nn.Linear) and child.in_features % 16 == child.out_features % 16 == 0
    }
    if not fits:
        raise ValueError("fp8=true: no linear map of a block has sides that 16 divides; use other widths, or fp8=false")
    for block in _outermost(module, tuple(blocks)):
        convert(block, module_filter_fn=lambda child, _: child in fits, config=config)


def _float8(*, emulate: bool) -> tuple[Callable[..., nn.Module], Any]:
    # What torchao's import says is for its authors.
    pytree = logging.getLogger("torch.utils._pytree")
    level = pytree.level
    pytree.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    finally:
        pytree.setLevel(level)
    return convert_to_float8_training, Float8LinearConfig(emulate=emulate, pad_inner_dim=True)


def compile_module(
    module: nn.Module,
    blocks: Sequence[type[nn.Module]],
    *,
    whole: bool,
    backend: str,
    mode: CompileMode = CompileMode.default,
) -> None:
    """Compile the step of a module in place, or its blocks one by one.

    Args:
        module: The trained module; one with `compile_step` knows itself what to compile.
        blocks: Classes of blocks.
        whole: Whether a step may be one graph; FSDP gathers weights between blocks, which no graph can hold.
        backend: Of `torch.compile`.
        mode: Likewise; `reduce_overhead` replays CUDA graphs.

    Raises:
        ValueError: Where there is no such backend.
    """
    _check_backend(backend)
    # Float32 products keep float32: that is what `precision` says, not an oversight.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    options = {"backend": backend} | ({} if mode is CompileMode.default else {"mode": mode.replace("_", "-")})
    if whole and isinstance(module, Compilable):
        module.compile_step(**options)
        return
    children = list(_outermost(module, tuple(blocks)))
    for child in children if children else [module]:
        child.compile(**options)


def _check_backend(name: str) -> None:
    from torch._dynamo import list_backends, lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        lookup_backend(name)
    except InvalidBackend:
        allowed = ", ".join([*list_backends(), "aot_eager", "eager"])
        raise ValueError(f"compile_backend={name}: there is no such backend; allowed: {allowed}") from None


def _outermost(module: nn.Module, blocks: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, blocks):
            yield child
        else:
            yield from _outermost(child, blocks)
