"""A step on a GPU neither waits for it nor copies to it, by tensors that are said to lie there and have no values."""

import traceback

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa_data import Batch
from hjepa_pretrain import settings
from hjepa_pretrain.task import build_task
from hjepa_train import World
from hjepa_train.guard import Guard, step_unless

GPU = torch.device("cuda:0")


class Transfers(TorchDispatchMode):
    """Collects where tensors of the host meet tensors of the GPU, or become such."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {value.device.type for value in (*args, result) if isinstance(value, torch.Tensor)}
        if len(devices) > 1:
            frames = [frame for frame in traceback.extract_stack() if "/hjepa_" in frame.filename]
            self.places.add(f"{function} at {frames[-1].filename}:{frames[-1].lineno}")
        return result


def to_gpu(module):
    """Give a module parameters and buffers that are said to lie on the GPU; equal ones stay equal."""
    moved = {}

    def gpu(tensor):
        if id(tensor) not in moved:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
            moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return moved[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: gpu(tensor) for name, tensor in tensors.items() if tensor is not None})
    return module


def batch_of(config):
    size, views = config.data.batch_size, config.data.views
    numbers = {name: torch.zeros(size, dtype=torch.int64, device=GPU) for name in ("labels", "sample", "epoch")}
    pixels = tuple(torch.empty(size, 3, *config.data.image_size, dtype=torch.uint8, device=GPU) for _ in range(views))
    return Batch(views=pixels, **numbers, crops=tuple(torch.empty(size, 5, device=GPU) for _ in range(views)))


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=hjepa_global"],
        ["recipe=hjepa_global", "hjepa.targets=ema", "hjepa.level_weights.kind=adaptive"],
        ["recipe=hjepa_contrast"],
        ["recipe=hjepa_contrast", "masks=released"],
        ["recipe=hjepa", "hjepa.objective=patch_discrimination"],
        ["recipe=ijepa"],
        ["recipe=simclr"],
        ["recipe=lejepa"],
        ["recipe=mae"],
    ],
    ids=" ".join,
)
def test_a_step_copies_nothing_to_the_gpu_and_reads_nothing_from_it(words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    config, _ = settings.load([*words, "data.batch_size=16"], quiet=True)
    task = build_task(config)
    # Reading a value of such a tensor is an error of torch's.
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(task).train()
        guard = Guard(config.trainer.guard, task, World(device=GPU), check_every=10, folder=None)
        optimizer = config.trainer.optimizer.build(task)
        batch = batch_of(config)
        # The first step keeps tables of masks and colours on the GPU.
        for step in range(3):
            with Transfers() as transfers:
                guard.begin(step)
                guard.saw(batch)
                loss = task(batch, step).loss
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = torch.empty_like(parameter)
                bad = guard.judge(loss, torch.ones((), device=GPU), {})
                guard.check(step + 1)
                step_unless(optimizer, bad, on_host=guard.on_host)
            assert not guard.on_host
            assert loss.device == GPU
            assert step == 0 or not transfers.places
