"""The arithmetic of a step on machines that are not here."""

import copy
import math

import pytest
import torch
from torch import nn

from hjepa_train import FSDPConfig, ParallelConfig, TrainerConfig
from hjepa_train.parallel import wrap
from hjepa_train.plan import MachineConfig, StepCost, _fake_world, fake_tensors, plan_step, sent_bytes, step_cost
from hjepa_train.protocols import StepOutput
from hjepa_train.sharded import is_sharded
from hjepa_train.testing import ToyBlock

COST = StepCost(flops=10**12, activation_bytes=1000, peak_bytes=5000)


def config(kind="single", accumulate=1, **fsdp):
    parallel = ParallelConfig(kind=kind, device="cpu", fsdp=FSDPConfig(**fsdp))
    return TrainerConfig(steps=1, precision="fp32", accumulate=accumulate, parallel=parallel)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "ddp"}, 2 * 400 * 7 / 8),
        ({"kind": "ddp", "accumulate": 4}, 2 * 400 * 7 / 8),
        # Trained weights twice and frozen ones once are gathered, gradients are scattered.
        ({"kind": "fsdp"}, (2 * 400 + 80) * 7 / 8 + 400 * 7 / 8),
        ({"kind": "fsdp", "param_dtype": "bf16"}, (2 * 200 + 40) * 7 / 8 + 400 * 7 / 8),
        ({"kind": "fsdp", "reshard_after_forward": False}, (400 + 80) * 7 / 8 + 400 * 7 / 8),
        ({"kind": "fsdp", "accumulate": 2}, 2 * (2 * 400 + 80) * 7 / 8 + 400 * 7 / 8),
        # Four copies on two ranks each: each rank averages its half of the gradient over the copies.
        ({"kind": "fsdp", "shard_size": 2}, (2 * 400 + 80) / 2 + 400 / 2 + 2 * 200 * 3 / 4),
    ],
)
def test_bytes_sent(fields, expected):
    assert sent_bytes(config(**fields), 8, trained=100, frozen=20) == expected


def test_one_process_sends_nothing():
    assert sent_bytes(config(), 1, trained=100, frozen=20) == 0


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
    """Two trained blocks, a frozen copy of them, and a layer that is in no block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.online = nn.Sequential(ToyBlock(8, 0.0), ToyBlock(8, 0.0))
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, batch, step):
        values = self.first(batch)
        with torch.no_grad():
            target = self.target(values)
        return StepOutput(loss=(self.online(values) - target).square().mean())


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
