import threading

import pytest
import torch
from torch import nn

from hjepa_train import CheckpointError, CheckpointStore, OptimizerConfig, World
from hjepa_train.checkpoint import Saver
from hjepa_train.checkpoint.parts import own_parts
from hjepa_train.checkpoint.state import generator_states, model_shapes, restore, run_tensors
from hjepa_train.checkpoint.tensors import SavedTensors, write_tensors
from hjepa_train.optim import set_rates
from hjepa_train.testing import ArithmeticStream, ToyModule


def _stepped(device, module, count=2):
    module = module.to(device)
    optimizer = OptimizerConfig().build(module)
    set_rates(optimizer, learning_rate=0.01, weight_decay=0.1)
    for step, batch in zip(range(count), ArithmeticStream(), strict=False):
        module(batch.to(device), step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def _save(folder, module, optimizer, world):
    """Write what one process has to a file; return it as it comes back."""
    tensors = run_tensors(module, optimizer) | generator_states(world)
    parts = own_parts({name: tensor.cpu() for name, tensor in tensors.items()}, 0, 1)
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    write_tensors(path, parts)
    return SavedTensors([path])


def test_everything_comes_back(device, tmp_path):
    world = World(device=device)
    module, optimizer = _stepped(device, ToyModule(late_step=100))
    saved = _save(tmp_path, module, optimizer, world)
    drawn = torch.rand(3), torch.rand(3, device=device)
    assert not any(name.startswith("optimizer/predictor") for name in saved)

    other, fresh = _stepped(device, ToyModule(seed=1), count=0)
    restore(other, fresh, world, saved)
    assert torch.equal(torch.rand(3), drawn[0])
    assert torch.equal(torch.rand(3, device=device), drawn[1])
    again = _save(tmp_path, other, fresh, world)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[n], again[n]) for n in saved if not n.startswith("generator"))
    assert model_shapes(other)["mask_token"] == [1, 8]


def test_a_snapshot_does_not_follow_the_model(device, tmp_path):
    """What the thread writes is what stood there when the step ended, whatever the training does meanwhile."""
    world = World(device=device)
    module, optimizer = _stepped(device, ToyModule())
    store = CheckpointStore(tmp_path)
    write, go = store.save, threading.Event()
    store.save = lambda *arguments: (go.wait(300), write(*arguments))
    saver = Saver(store, world)
    before = {name: tensor.clone() for name, tensor in run_tensors(module, optimizer).items()}
    saver.take(2, run_tensors(module, optimizer), generator_states(world), {"step": 2}, model_shapes(module))
    set_rates(optimizer, learning_rate=0.1, weight_decay=0.0)
    module(next(iter(ArithmeticStream())).to(device), 0).loss.backward()
    optimizer.step()
    go.set()
    saver.wait()
    saved = store.newest().tensors()
    assert all(torch.equal(saved[name], tensor.cpu()) for name, tensor in before.items())
    assert not all(torch.equal(saved[name], tensor.cpu()) for name, tensor in run_tensors(module, optimizer).items())


def test_a_tied_tensor_is_saved_under_both_names(device, tmp_path):
    first = nn.Linear(3, 3, bias=False).to(device)
    module = nn.ModuleDict({"a": first, "b": nn.Linear(3, 3, bias=False).to(device)})
    module["b"].weight = first.weight
    saved = _save(tmp_path, module, OptimizerConfig().build(module), World(device=device))
    assert torch.equal(saved["model/a.weight"], saved["model/b.weight"])


def test_a_rank_that_was_not_there_draws_its_own_numbers(device, tmp_path):
    module, optimizer = _stepped(device, ToyModule())
    saved = _save(tmp_path, module, optimizer, World(device=device))
    draws = []
    for rank in (0, 1, 2, 1):
        restore(module, optimizer, World(rank=rank, device=device), saved)
        draws.append(torch.rand(4))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert torch.equal(draws[1], draws[3])


def test_state_of_a_parameter_that_is_frozen_here_is_refused(device, tmp_path):
    module, optimizer = _stepped(device, ToyModule())
    saved = _save(tmp_path, module, optimizer, World(device=device))
    frozen = ToyModule().to(device)
    frozen.predictor.requires_grad_(False)
    with pytest.raises(CheckpointError, match="optimizer state of 6 frozen or unknown parameters: predictor"):
        restore(frozen, OptimizerConfig().build(frozen), World(device=device), saved)
