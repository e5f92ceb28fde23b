"""One process, DDP and FSDP2 are the same program: joining the world, wrapping a module, talking to other ranks."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hjepa_train.errors import choice
from hjepa_train.precision import Precision
from hjepa_train.protocols import Batch, SkipsParameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

_PATIENCE = 60.0
_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


class ParallelKind(StrEnum):
    """How a run is spread over processes."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"


@dataclass(kw_only=True, slots=True)
class FSDPConfig:
    """How FSDP2 shards; optimizer and EMA work on the shards, which are float32 whatever is sent."""

    param_dtype: Precision = Precision.fp32
    """Of the weights that are gathered for a block: `bf16` halves what is sent, and is what autocast computes with."""
    reduce_dtype: Precision = Precision.fp32
    """Of the gradients that are summed over ranks."""
    reshard_after_forward: bool = True
    """Free a block's weights after its forward pass and gather them again for the backward; false keeps them."""
    shard_size: int | None = None
    """Ranks over which weights are sharded, e.g. those of a machine: groups of so many hold copies; null means all."""
    cpu_offload: bool = False
    """CUDA only: keep shards, gradients and optimizer state in the memory of the host."""

    def __post_init__(self) -> None:
        """Refuse unknown choices."""
        self.param_dtype = choice(Precision, "param_dtype", self.param_dtype)
        self.reduce_dtype = choice(Precision, "reduce_dtype", self.reduce_dtype)
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size}: no number of ranks; allowed: 1 and more, or null for all")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How a run is spread over the processes that `torchrun` started."""

    kind: ParallelKind = ParallelKind.single
    """`single` process, `ddp` (each rank has all weights) or `fsdp` (FSDP2, weights sharded over the ranks)."""
    find_unused_parameters: bool | None = None
    """DDP only: allow parameters without gradient, at the price of a walk over the graph each step; null asks the
    module's `may_skip_parameters`, and allows where it does not say."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`; the rank on its machine picks the GPU."""
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)

    def __post_init__(self) -> None:
        """Refuse unknown choices."""
        self.kind = choice(ParallelKind, "kind", self.kind)
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device}: unknown; allowed: auto, cpu, cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda: no CUDA device is visible; use device=auto or cpu")


@dataclass(kw_only=True, slots=True, frozen=True)
class World:
    """The processes of a run as one of them sees them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    """The process group; None means the default one."""

    def beside(self) -> World:
        """Return the same ranks on the CPU in a group of their own, for another thread; all ranks call it."""
        cpu = torch.device("cpu")
        if self.size == 1:
            return dataclasses.replace(self, device=cpu)
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return dataclasses.replace(self, device=cpu, group=group)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor over ranks, in place, and return it."""
        if self.size > 1:
            total = _send(values.clone())  # its caller keeps the other
            dist.all_reduce(total, group=self.group)
            values.copy_(total)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Tell for each flag whether it is set on any rank; all ranks get the same answer."""
        if self.size == 1:
            return flags
        votes = _send(torch.tensor(flags, dtype=torch.int32, device=self.control_device))
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(vote) for vote in votes.tolist())

    def from_main(self, value: int) -> int:
        """Return the integer that the main rank has."""
        if self.size == 1:
            return value
        shared = _send(torch.tensor([value], dtype=torch.int64, device=self.control_device))
        dist.broadcast(shared, src=0, group=self.group)
        return int(shared.item())

    def first(self, name: str, value: int) -> int:
        """Return the integer that the main rank gave when it was asked first, before torchrun started it again.

        Args:
            name: Of what is remembered; by torchrun's agent, where there is one, as long as that lives.
            value: The main rank's.
        """
        store = _agent_store() if self.is_main else None
        return self.from_main(value if store is None else int(store.compare_set(f"first/{name}", "", str(value))))

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate tensors of equal shape over ranks along their first axis."""
        if self.size == 1:
            return tensor
        parts = [_send(torch.empty_like(tensor)) for _ in range(self.size)]
        dist.all_gather(parts, _send(tensor.clone(memory_format=torch.contiguous_format)), group=self.group)
        return torch.cat(parts)

    @property
    def control_device(self) -> torch.device:
        """Where the hosts exchange small tensors: the CPU if gloo is there, so that a GPU is not made to wait."""
        return torch.device("cpu") if "cpu:gloo" in _backends() else self.device


def init_world(config: ParallelConfig | None = None, *, init_method: str | None = None) -> World:
    """Join the processes that `torchrun` started, or stay alone.

    Args:
        config: How the run is spread; None is one process.
        init_method: Where the ranks meet; None means the environment that `torchrun` sets.

    Returns:
        This rank's view of the world; its device is current.

    Raises:
        ValueError: Where `parallel=single` runs on several ranks, or a machine has fewer GPUs than ranks.
    """
    config = ParallelConfig() if config is None else config
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    if config.kind is ParallelKind.single and size > 1:
        raise ValueError(f"parallel=single: torchrun started {size} processes; use parallel=ddp or parallel=fsdp")
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", _gpu(local_rank)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    needed = size > 1 or config.kind is ParallelKind.fsdp
    if needed and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "cpu:gloo"
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            _join(backend, init_method, rank, size)
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


def _gpu(local_rank: int) -> int:
    """Return which of the visible GPUs a rank takes; Slurm (`--gpus-per-task`), unlike torchrun, may show it one."""
    count = torch.cuda.device_count()
    index = 0 if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ else local_rank
    if index >= count:
        raise ValueError(
            f"LOCAL_RANK={local_rank}: {count} CUDA devices are visible; start as many processes a machine, or use "
            "device=cpu"
        )
    return index


def _join(backend: str, init_method: str | None, rank: int, size: int) -> None:
    shared = None if init_method is not None else _agent_store()
    if shared is None:
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size)
        return
    # Without names of their own, workers that torchrun starts again find the addresses of those that died, and wait
    # for them.
    store = dist.PrefixStore(f"life-{os.environ['TORCHELASTIC_RESTART_COUNT']}", shared)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _agent_store() -> dist.Store | None:
    """Return the store of torchrun's agent, which outlives the workers that it starts; None without an agent."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed.rendezvous import rendezvous

    store: dist.Store = next(rendezvous("env://"))[0]
    return store


def leave_world() -> None:
    """Leave the process group, if there is one; call it once at the end of the program.

    A gloo thread that still holds the last collective's tensor when the interpreter goes away aborts a process that
    has done all its work (pytorch/pytorch#179291). So the modules that hold the group go first, and the threads are
    waited for: however late they are, they let go of what a `World` has sent, and get a moment for what others have.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        gc.collect()
        time.sleep(0.1)
        deadline = time.monotonic() + _PATIENCE
        # The traceback of a collective that has failed holds its tensors too.
        while _sent and sys.exception() is None and time.monotonic() < deadline:
            time.sleep(0.001)


_sent: weakref.WeakSet[Tensor] = weakref.WeakSet()
"""Tensors of collectives on the CPU that gloo's threads, or those who wait for them, still hold."""


def _send(tensor: Tensor) -> Tensor:
    if tensor.is_cpu:
        _sent.add(tensor)
    return tensor


def wrap(module: nn.Module, config: ParallelConfig, world: World, blocks: Sequence[type[nn.Module]] = ()) -> nn.Module:
    """Return a module that computes `(loss, metrics, embeddings)` of a batch on this rank and averages gradients.

    Args:
        module: The trained module, on the device.
        config: How the run is spread.
        world: This rank's view of it.
        blocks: FSDP only: classes of submodules that are sharded and gathered one at a time.
    """
    adapter = _Adapter(module)
    if config.kind is ParallelKind.fsdp:
        return _shard(adapter, config.fsdp, world, tuple(blocks))
    if world.size == 1:
        return adapter
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    unused = config.find_unused_parameters
    if unused is None:
        unused = module.may_skip_parameters if isinstance(module, SkipsParameters) else True
    return DistributedDataParallel(
        adapter, device_ids=device_ids, find_unused_parameters=unused, gradient_as_bucket_view=True
    )


@contextmanager
def gradient_sync(wrapped: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Average gradients over ranks in the backward inside, or leave it to a later micro-batch."""
    with ExitStack() as stack:
        if isinstance(wrapped, DistributedDataParallel) and not enabled:
            stack.enter_context(wrapped.no_sync())
        elif _is_fsdp(wrapped):
            wrapped.set_requires_gradient_sync(enabled)
        yield


def _shard(adapter: nn.Module, config: FSDPConfig, world: World, blocks: tuple[type[nn.Module], ...]) -> nn.Module:
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if config.cpu_offload and world.device.type != "cuda":
        raise ValueError("cpu_offload=true: the weights are in the memory of the host already; use it with device=cuda")
    options: dict[str, Any] = {
        "mesh": _mesh(config, world),
        "reshard_after_forward": config.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(param_dtype=config.param_dtype.dtype, reduce_dtype=config.reduce_dtype.dtype),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    }
    learning = []
    for child in adapter.modules():
        if isinstance(child, blocks):
            block = fully_shard(child, **options)
            if any(parameter.requires_grad for parameter in child.parameters()):
                learning.append(block)
    # Else the backward pass gathers early what ran before a block, also where that is frozen and not needed again.
    for before, block in pairwise(learning):
        block.set_modules_to_backward_prefetch([before])
    # What is left at the root is used until the end of the forward pass; its backward begins at once.
    fully_shard(adapter, **options | {"reshard_after_forward": None if config.reshard_after_forward else False})
    # Weights are gathered for `forward` alone, unless another method is named.
    register_fsdp_forward_method(adapter, "call")
    return adapter


def _mesh(config: FSDPConfig, world: World) -> DeviceMesh:
    """Return the ranks in a row, or in rows of `shard_size` where each row holds all weights."""
    from torch.distributed.device_mesh import init_device_mesh

    size = world.size if config.shard_size is None else config.shard_size
    if world.size % size:
        raise ValueError(
            f"shard_size={size}: does not divide the {world.size} ranks; allowed: a divisor, or null for all"
        )
    if size == world.size:
        return init_device_mesh(world.device.type, (size,))
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("copy", "shard"))


def _is_fsdp(module: nn.Module) -> TypeGuard[FSDPModule]:
    return hasattr(module, "set_requires_gradient_sync")


class _Adapter(nn.Module):
    """Plain tuples and dicts: DDP and FSDP look for tensors in what a forward returns, and not in any object."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]:
        output = self.module(batch, step)
        return output.loss, dict(output.metrics), dict(output.embeddings)

    def call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401
        return getattr(self.module, name)(*arguments)


def call(wrapped: nn.Module, name: str, *arguments: Any) -> Any:  # noqa: ANN401
    """Call a method of the module inside what `wrap` returned, without gradient; under FSDP all ranks call it."""
    adapter = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    # Weights that FSDP gathers here are used for training later, which tensors of inference mode cannot be.
    with torch.inference_mode(False), torch.no_grad():
        return adapter.call(name, *arguments)  # type: ignore[operator]


def _backends() -> str:
    return str(dist.get_backend_config()) if dist.is_initialized() else ""
