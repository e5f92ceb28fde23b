import pytest
import torch
from torch import nn

from hjepa_train import OptimizerConfig, parameter_groups
from hjepa_train.optim import set_rates
from hjepa_train.testing import ToyModule


def _names(module, group):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_matrices_decay_and_offsets_do_not(device):
    module = ToyModule().to(device)
    decay, rest = (_names(module, group) for group in parameter_groups(module))
    assert decay == {
        f"{block}.{layer}.weight" for block in ("online.0", "online.1", "predictor") for layer in ("expand", "reduce")
    }
    assert "mask_token" in rest
    assert {"predictor.norm.weight", "online.0.expand.bias"} <= rest
    assert not any(name.startswith("target") for name in decay | rest)


def test_a_name_counts_only_at_the_end(device):
    module = nn.ModuleDict({"tokenizer": nn.Linear(2, 2)}).to(device)
    module.register_parameter("registers", nn.Parameter(torch.zeros(1, 4, 2, device=device)))
    decay, rest = (_names(module, group) for group in parameter_groups(module))
    assert decay == {"tokenizer.weight"}
    assert rest == {"registers", "tokenizer.bias"}


def test_rates_reach_the_groups(device):
    module = ToyModule().to(device)
    optimizer = OptimizerConfig().build(module)
    set_rates(optimizer, learning_rate=0.5, weight_decay=0.25)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.25), (0.5, 0.0)]


def test_weight_decay_pulls_matrices_only(device):
    module = nn.Linear(3, 3).to(device)
    before = [parameter.detach().clone() for parameter in (module.weight, module.bias)]
    optimizer = OptimizerConfig().build(module)
    set_rates(optimizer, learning_rate=0.1, weight_decay=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(module.weight, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(module.bias, before[1])


def test_nothing_to_train_is_refused(device):
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).to(device).requires_grad_(False))


@pytest.mark.parametrize("fields", [{"betas": (0.9, 1.0)}, {"eps": 0.0}])
def test_a_wrong_optimizer_is_refused(fields):
    with pytest.raises(ValueError, match="allowed"):
        OptimizerConfig(**fields)
