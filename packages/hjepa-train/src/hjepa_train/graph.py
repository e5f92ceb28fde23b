"""What happens to a module before it is spread: activations that are computed again, then compilation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hjepa_train.protocols import Compilable


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


def compile_module(module: nn.Module, blocks: Sequence[type[nn.Module]], *, whole: bool, backend: str) -> None:
    """Compile the step of a module in place, or its blocks one by one.

    Args:
        module: The trained module; one with `compile_step` knows itself what to compile.
        blocks: Classes of blocks.
        whole: Whether a step may be one graph; FSDP gathers weights between blocks, which no graph can hold.
        backend: Of `torch.compile`.
    """
    if whole and isinstance(module, Compilable):
        module.compile_step(backend=backend)
        return
    children = list(_outermost(module, tuple(blocks)))
    for child in children if children else [module]:
        child.compile(backend=backend)


def _outermost(module: nn.Module, blocks: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, blocks):
            yield child
        else:
            yield from _outermost(child, blocks)
