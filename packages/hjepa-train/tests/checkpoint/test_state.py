import pytest
import torch
from torch import nn

from hjepa_train import CheckpointError, OptimizerConfig, World
from hjepa_train.checkpoint.state import collect, model_shapes, restore
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


def test_everything_comes_back(device):
    world = World(device=device)
    module, optimizer = _stepped(device, ToyModule(late_step=100))
    saved = collect(module, optimizer, world)
    drawn = torch.rand(3), torch.rand(3, device=device)
    assert not any(name.startswith("optimizer/predictor") for name in saved)

    other, fresh = _stepped(device, ToyModule(seed=1), count=0)
    restore(other, fresh, world, saved)
    assert torch.equal(torch.rand(3), drawn[0])
    assert torch.equal(torch.rand(3, device=device), drawn[1])
    again = collect(other, fresh, world)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[n], again[n]) for n in saved if not n.startswith("generator"))
    assert model_shapes(other)["mask_token"] == [1, 8]


def test_saved_tensors_do_not_share_memory_with_the_model(device):
    module, optimizer = _stepped(device, ToyModule())
    saved = {name: tensor.clone() for name, tensor in collect(module, optimizer, World(device=device)).items()}
    other, fresh = _stepped(device, ToyModule(seed=1), count=0)
    restore(other, fresh, World(device=device), saved)
    copies = {name: tensor.clone() for name, tensor in saved.items()}
    set_rates(fresh, learning_rate=0.1, weight_decay=0.0)
    other(next(iter(ArithmeticStream())).to(device), 0).loss.backward()
    fresh.step()
    assert all(torch.equal(copies[name], saved[name]) for name in saved)


def test_a_tied_tensor_is_saved_under_both_names(device):
    first = nn.Linear(3, 3, bias=False).to(device)
    module = nn.ModuleDict({"a": first, "b": nn.Linear(3, 3, bias=False).to(device)})
    module["b"].weight = first.weight
    saved = collect(module, OptimizerConfig().build(module), World(device=device))
    assert torch.equal(saved["model/a.weight"], saved["model/b.weight"])
    assert saved["model/a.weight"].data_ptr() != saved["model/b.weight"].data_ptr()


def test_a_rank_that_was_not_there_draws_its_own_numbers(device):
    module, optimizer = _stepped(device, ToyModule())
    saved = collect(module, optimizer, World(device=device))
    draws = []
    for rank in (0, 1, 2, 1):
        restore(module, optimizer, World(rank=rank, device=device), saved)
        draws.append(torch.rand(4))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert torch.equal(draws[1], draws[3])


def test_state_of_a_parameter_that_is_frozen_here_is_refused(device):
    module, optimizer = _stepped(device, ToyModule())
    saved = collect(module, optimizer, World(device=device))
    frozen = ToyModule().to(device)
    frozen.predictor.requires_grad_(False)
    with pytest.raises(CheckpointError, match="optimizer state of 6 frozen or unknown parameters: predictor"):
        restore(frozen, OptimizerConfig().build(frozen), World(device=device), saved)
