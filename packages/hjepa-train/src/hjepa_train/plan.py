"""What a step would cost on machines that are not here: memory, arithmetic, bytes sent and time, per rank.

The step runs once on fake tensors, which have a shape and no memory; shards are counted under a fake process group.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hjepa_train.config import TrainerConfig
from hjepa_train.optim import OptimizerKind
from hjepa_train.parallel import FSDPConfig, ParallelKind, World, wrap
from hjepa_train.precision import autocast
from hjepa_train.sharded import local


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    """What a rank is made of; the defaults are an H100 SXM on a 400 Gb/s network."""

    peak_tflops: float = 989.0
    """Matrix products in the precision of the run, 10^12 operations a second, as its maker says (dense bf16)."""
    efficiency: float = 0.5
    """Share of it that a step reaches; measure it on one GPU."""
    bandwidth_gb: float = 50.0
    """10^9 bytes a second that a rank sends to ranks on other machines."""
    memory_gib: float = 80.0
    """Memory of the device."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name in ("peak_tflops", "efficiency", "bandwidth_gb", "memory_gib"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: not positive; allowed: above 0")
        if self.efficiency > 1.0:
            raise ValueError(f"efficiency={self.efficiency}: more than all; allowed: above 0 up to 1")


@dataclass(kw_only=True, slots=True, frozen=True)
class StepCost:
    """What the forward and backward pass of a micro-batch take, before anything is sharded."""

    flops: int
    """Operations of matrix products, convolutions and attention; a multiply-add counts as two."""
    activation_bytes: int
    """What the forward pass keeps for the backward pass, weights apart."""
    peak_bytes: int
    """Most that the pass holds at once: activations, gradients as they come, and what operations hand on."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Plan:
    """A step of one rank."""

    world_size: int
    parameters: int
    """Of the whole model, the target branch among them."""
    trained: int
    """Of them, those with a gradient."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    working_bytes: int
    """Most that activations and what operations hand on take at once, gradients apart."""
    gathered_bytes: int
    """FSDP: whole weights of the block at work and of the one that is fetched meanwhile, and those that stay: what is
    in no block, or all without `reshard_after_forward`."""
    host_bytes: int
    """FSDP with `cpu_offload`: weights, gradients and optimizer state that lie in the memory of the host."""
    bus_bytes: int
    """Likewise: a step, between host and device; weights as often as they are gathered, gradients once."""
    sent_bytes: int
    """A step, gathering and averaging; statistics of the losses are a few kilobytes more."""
    flops: int
    """A step."""
    compute_seconds: float
    send_seconds: float

    @property
    def memory_bytes(self) -> int:
        """What PyTorch holds on the device at the peak of a step."""
        kept = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes - self.host_bytes
        return kept + self.working_bytes + self.gathered_bytes

    @property
    def seconds(self) -> float:
        """Of a step, nothing sent while something is computed: an upper bound at this efficiency.

        With `cpu_offload` neither the bus nor the optimizer on the host is in it.
        """
        return self.compute_seconds + self.send_seconds


@contextmanager
def fake_tensors(module: nn.Module) -> Iterator[None]:
    """Give a module on the meta device fake tensors on the CPU; what is made inside is fake too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made: dict[Tensor, Tensor] = {}
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    if parameter not in made:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                        made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    child._parameters[name] = made[parameter]  # type: ignore[assignment]
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield


def step_cost(module: nn.Module, loss: Callable[[], Tensor], config: TrainerConfig) -> StepCost:
    """Run a forward and a backward pass and count; on fake tensors it takes no memory.

    Args:
        module: The trained module, whose weights do not count as activations.
        loss: Runs the forward pass of a micro-batch.
        config: Its precision is used.
    """
    from torch.utils.flop_counter import FlopCounterMode

    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    # The storages stay referenced: the address of one that is gone could be another's.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with _LiveBytes() as live, FlopCounterMode(display=False) as counter:
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with saving, autocast(config.precision, torch.device("cpu")):
            value = loss()
        activations = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        value.backward()  # type: ignore[no-untyped-call]
    return StepCost(flops=counter.get_total_flops(), activation_bytes=activations, peak_bytes=live.peak)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of the tensors that operations make, until they are gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = weakref.finalize(storage, self._drop, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, size: int) -> None:
        self.now -= size


def plan_step(
    module: nn.Module,
    cost: StepCost,
    config: TrainerConfig,
    world_size: int,
    machine: MachineConfig,
    blocks: Sequence[type[nn.Module]] = (),
) -> Plan:
    """Return what a step takes on a rank of a world.

    Args:
        module: The trained module on the meta device, never run; it is sharded here.
        cost: Of a micro-batch of one rank.
        config: Parallelism, accumulation, optimizer.
        world_size: Number of ranks.
        machine: What a rank is made of.
        blocks: Classes of submodules that are sharded and gathered one at a time.
    """
    sharded = config.parallel.kind is ParallelKind.fsdp
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    trained = sum(count for count, learns in sizes if learns)
    gathered = _gathered(module, config.parallel.fsdp, blocks) if sharded else 0
    with _fake_world(world_size) as world:
        if sharded:
            # Shards are as large wherever they lie, and there is no device here.
            wrap(module, replace(config.parallel, fsdp=replace(config.parallel.fsdp, cpu_offload=False)), world, blocks)
        weights = sum(_bytes(parameter) for parameter in module.parameters())
        buffers = sum(_bytes(buffer) for buffer in module.buffers())
        gradients = sum(_bytes(parameter) for parameter in module.parameters() if parameter.requires_grad)
        optimizer = _optimizer_bytes(module, config)
        again = _gathered_again(module, blocks) if sharded and config.parallel.fsdp.reshard_after_forward else 0
    host = bus = 0
    if sharded and config.parallel.fsdp.cpu_offload:
        host = weights + gradients + optimizer
        # What is fetched are float32 shards, which the device casts.
        bus = config.accumulate * (weights + again) + gradients
    sent = sent_bytes(config, world_size, gathered=(weights + again) // 4, trained=gradients // 4)
    if sharded and config.accumulate > 1:
        # Until the last micro-batch each rank keeps whole gradients.
        gradients += trained * config.parallel.fsdp.reduce_dtype.dtype.itemsize
    flops = cost.flops * config.accumulate
    return Plan(
        world_size=world_size,
        parameters=sum(count for count, _ in sizes),
        trained=trained,
        parameter_bytes=weights + buffers,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        activation_bytes=cost.activation_bytes,
        working_bytes=max(cost.activation_bytes, cost.peak_bytes - 4 * trained),
        gathered_bytes=gathered,
        host_bytes=host,
        bus_bytes=bus,
        sent_bytes=sent,
        flops=flops,
        compute_seconds=flops / (machine.peak_tflops * 1e12 * machine.efficiency),
        send_seconds=sent / (machine.bandwidth_gb * 1e9),
    )


def sent_bytes(config: TrainerConfig, world_size: int, *, gathered: int, trained: int) -> int:
    r"""Return the bytes that a rank sends in a step, by ring algorithms.

    Gathering or scattering over $W$ ranks sends $W-1$ shards, an average of n bytes $2n (W-1)/W$. DDP, whose shard is
    everything, averages float32 gradients once a step. FSDP gathers weights in each micro-batch; it scatters gradients
    once a step, and averages them over its copies.

    Args:
        config: Parallelism and accumulation.
        world_size: Number of ranks.
        gathered: Parameters of a shard, each as often as a micro-batch gathers it.
        trained: Those of a shard that have a gradient.
    """
    shards, weight, gradient = 1, 4, 4
    if config.parallel.kind is ParallelKind.fsdp:
        fsdp: FSDPConfig = config.parallel.fsdp
        shards = world_size if fsdp.shard_size is None else fsdp.shard_size
        weight, gradient = fsdp.param_dtype.dtype.itemsize, fsdp.reduce_dtype.dtype.itemsize
    copies = world_size // shards
    within = (shards - 1) * (config.accumulate * weight * gathered + gradient * trained)
    return within + 2 * gradient * trained * (copies - 1) // copies


def _gathered_again(module: nn.Module, blocks: Sequence[type[nn.Module]]) -> int:
    """Count the bytes of a rank's shards of what is freed after the forward pass and gathered for the backward.

    That is a block that learns; the root, which holds what is in no block, stays in between.
    """
    wrapped = (child for child in module.modules() if isinstance(child, tuple(blocks)))
    learning = nn.ModuleList(child for child in wrapped if any(p.requires_grad for p in child.parameters()))
    return sum(_bytes(parameter) for parameter in learning.parameters())


def _gathered(module: nn.Module, config: FSDPConfig, blocks: Sequence[type[nn.Module]]) -> int:
    """Count what FSDP has gathered at the end of the forward pass, and one block more that waits in a buffer."""
    wrapped = nn.ModuleList(child for child in module.modules() if isinstance(child, tuple(blocks)))
    biggest = max(map(_size, wrapped), default=0)
    kept = _size(module)
    if config.reshard_after_forward:
        # The root, which holds what is in no block, is never freed before its backward pass.
        kept += biggest - _size(wrapped)
    return (kept + biggest) * config.param_dtype.dtype.itemsize


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(tensor: Tensor) -> int:
    return local(tensor).nbytes


def _optimizer_bytes(module: nn.Module, config: TrainerConfig) -> int:
    """Count the running means: AdamW keeps two of each parameter, the others one."""
    total = 0
    adamw = config.optimizer.kind in (OptimizerKind.adamw, OptimizerKind.muon)
    for group in config.optimizer.build(module).param_groups:
        means = 2 if adamw and not group.get("muon") else 1
        total += means * sum(_bytes(parameter) for parameter in group["params"])
    return total


@contextmanager
def _fake_world(size: int) -> Iterator[World]:
    """Be rank 0 of a world of which no other rank is there."""
    if dist.is_initialized():
        raise ValueError("plan: runs in one process, without torchrun; start it alone")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(rank=0, size=size, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()
