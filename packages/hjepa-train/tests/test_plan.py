"""The arithmetic of a step on machines that are not here."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa_train import FSDPConfig, ParallelConfig, TrainerConfig
from hjepa_train.parallel import gradient_sync, wrap
from hjepa_train.plan import MachineConfig, StepCost, _fake_world, fake_tensors, plan_step, sent_bytes, step_cost
from hjepa_train.protocols import StepOutput
from hjepa_train.sharded import is_sharded
from hjepa_train.testing import ToyBlock

COST = StepCost(flops=10**12, activation_bytes=1000, peak_bytes=5000)


def config(kind="single", accumulate=1, **fsdp):
    parallel = ParallelConfig(kind=kind, device="cpu", fsdp=FSDPConfig(**fsdp))
    return TrainerConfig(steps=1, precision="fp32", accumulate=accumulate, parallel=parallel)


class Sent(TorchDispatchMode):
    """Counts the bytes that a rank would send for the collectives of the fake group, by ring algorithms."""

    def __init__(self, copies):
        super().__init__()
        self.count, self.copies = 0, copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            self.count += abs(args[0].nbytes - args[1].nbytes)
        elif name == "allreduce_":
            self.count += sum(2 * tensor.nbytes * (self.copies - 1) // self.copies for tensor in args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "fsdp", [{}, {"param_dtype": "bf16"}, {"reshard_after_forward": False}, {"shard_size": 2, "reduce_dtype": "bf16"}]
)
def test_bytes_planned_are_those_that_fsdp_sends(fsdp, accumulate, width):
    settings = config("fsdp", accumulate=accumulate, **fsdp)
    with _fake_world(4) as world:
        wrapped = wrap(Branches(width), settings.parallel, world, (ToyBlock,))
        with Sent(copies=2) as sent:
            for micro in range(accumulate):
                with gradient_sync(wrapped, enabled=micro == accumulate - 1):
                    loss, *_ = wrapped(torch.rand(4, width), 0)
                    loss.backward()
    with torch.device("meta"):
        plan = plan_step(Branches(width), COST, settings, 4, MachineConfig(), (ToyBlock,))
    assert sent.count > 0
    assert plan.sent_bytes == sent.count


@pytest.mark.parametrize("accumulate", [1, 4])
def test_ddp_averages_once_a_step(accumulate):
    assert sent_bytes(config("ddp", accumulate), 8, gathered=120, trained=100) == 2 * 400 * 7 / 8


def test_one_process_sends_nothing():
    assert sent_bytes(config(), 1, gathered=120, trained=100) == 0


def _module():
    with torch.device("meta"):
        module = nn.Sequential(ToyBlock(8, 0.0), ToyBlock(8, 0.0), nn.Linear(8, 8))
        module[2].requires_grad_(False)
    return module


def test_a_plan_counts_the_shards_of_a_rank():
    module = _module()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    machine = MachineConfig(peak_tflops=100.0, efficiency=0.5, bandwidth_gb=1.0)
    alone = plan_step(_module(), COST, config(), 1, machine)
    assert (alone.parameters, alone.trained) == (trained + 72, trained)
    assert alone.parameter_bytes == 4 * (trained + 72)
    assert alone.gradient_bytes == 4 * trained
    assert alone.optimizer_bytes == 8 * trained
    assert alone.compute_seconds == pytest.approx(10**12 / 50e12)
    assert (alone.sent_bytes, alone.send_seconds, alone.gathered_bytes) == (0, 0.0, 0)

    sharded = plan_step(module, COST, config("fsdp"), 4, machine, (ToyBlock,))
    # All sizes here are multiples of 4 along the first axis: a quarter of everything lies on a rank.
    assert sharded.parameter_bytes == alone.parameter_bytes / 4
    assert sharded.gradient_bytes == alone.gradient_bytes / 4
    assert sharded.optimizer_bytes == alone.optimizer_bytes / 4
    assert (sharded.host_bytes, sharded.bus_bytes) == (0, 0)
    assert sharded.seconds == pytest.approx(sharded.compute_seconds + sharded.sent_bytes / 1e9)
    assert not torch.distributed.is_initialized()


class Branches(nn.Module):
    """Three trained blocks, a frozen copy of two, which runs between them, and a layer that is in no block."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.online = nn.Sequential(ToyBlock(width, 0.0), ToyBlock(width, 0.0))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = ToyBlock(width, 0.0)

    def forward(self, batch, step):
        values = self.first(batch)
        context = self.online(values)
        with torch.no_grad():
            target = self.target(values)
        return StepOutput(loss=(self.predictor(context) - target).square().mean())


@pytest.mark.parametrize("reshard", [True, False])
def test_gathered_weights_are_those_that_fsdp_holds(reshard):
    settings = config("fsdp", reshard_after_forward=reshard)
    held = []
    with _fake_world(4) as world:
        module = Branches()
        block = sum(p.nbytes for p in module.online[0].parameters())
        wrapped = wrap(module, settings.parallel, world, (ToyBlock,))

        def look(*_):
            held.append(sum(p.nbytes for p in wrapped.parameters() if not is_sharded(p)))

        for child in module.modules():
            if isinstance(child, nn.GELU | nn.Dropout):
                child.register_forward_hook(look)
        wrapped(torch.rand(4, 8), 0)
        look()
    with torch.device("meta"):
        plan = plan_step(Branches(), COST, settings, 4, MachineConfig(), (ToyBlock,))
    assert plan.gathered_bytes == max(held) + block


def test_offloaded_shards_are_in_the_memory_of_the_host():
    def plan(**fsdp):
        return plan_step(_module(), COST, config("fsdp", accumulate=3, **fsdp), 4, MachineConfig(), (ToyBlock,))

    here, there = plan(), plan(cpu_offload=True)
    trained, frozen = (sum(p.numel() for p in _module().parameters() if p.requires_grad is on) for on in (True, False))
    # Weights, gradients and two means; the whole gradients of micro-batches stay on the device.
    assert there.host_bytes == 4 * (4 * trained + frozen) / 4
    assert there.memory_bytes == here.memory_bytes - there.host_bytes
    assert there.bus_bytes == 3 * (2 * trained + frozen) + trained
    assert plan(cpu_offload=True, reshard_after_forward=False).bus_bytes == 3 * (trained + frozen) + trained


def test_the_cost_of_a_step_by_hand():
    with torch.device("meta"):
        module = nn.Linear(32, 16, bias=False)
    with fake_tensors(module):
        values = torch.empty(8, 32)
        cost = step_cost(module, lambda: module(values).square().sum(), config())
    # Forward, and backward to the weight alone: a multiply-add is two operations.
    assert cost.flops == 2 * (2 * 8 * 32 * 16)
    # The input, made outside, and the output, which the square keeps.
    assert cost.activation_bytes == 4 * (8 * 32 + 8 * 16)


@pytest.mark.parametrize(
    "fields", [{"efficiency": 0.0}, {"peak_tflops": -1.0}, {"memory_gib": math.nan}, {"efficiency": 1.5}]
)
def test_a_wrong_machine_is_refused(fields):
    with pytest.raises(ValueError, match="allowed: above 0"):
        MachineConfig(**fields)
