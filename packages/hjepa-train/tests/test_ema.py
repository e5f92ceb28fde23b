import copy

import pytest
import torch
from torch import nn

from hjepa_train import EMA


def _pair(device):
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(device)
    target = copy.deepcopy(online).requires_grad_(False)
    return online, target


def test_parameters_and_buffers_follow_the_closed_form(device):
    online, target = _pair(device)
    ema = EMA([(online, target)])
    momenta = [0.9, 0.99, 0.5, 1.0]
    expected = {name: value.double() for name, value in target.state_dict().items()}
    for momentum in momenta:
        with torch.no_grad():
            for parameter in online.parameters():
                parameter.add_(torch.randn_like(parameter))
        online(torch.randn(8, 4, device=device))
        ema.update(momentum)
        for name, value in online.state_dict().items():
            expected[name] = momentum * expected[name] + (1 - momentum) * value.double()
    for name, value in target.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert int(value) == len(momenta)
        else:
            assert torch.allclose(value.double(), expected[name], atol=1e-6), name


def test_momentum_one_stays_and_zero_copies(device):
    online, target = _pair(device)
    before = copy.deepcopy(target.state_dict())
    with torch.no_grad():
        online[0].weight.add_(1.0)
    ema = EMA([(online, target)])
    ema.update(1.0)
    assert torch.equal(target[0].weight, before["0.weight"])
    ema.update(0.0)
    assert torch.equal(target[0].weight, online[0].weight)
    assert not target[0].weight.requires_grad


def test_branches_may_lie_in_memory_in_other_orders(device):
    online = nn.Conv2d(3, 4, 3).to(device)
    target, expected = copy.deepcopy(online), copy.deepcopy(online)
    online = online.to(memory_format=torch.channels_last)
    with torch.no_grad():
        online.weight.add_(torch.randn_like(online.weight))
    EMA([(online, target)]).update(0.9, unless=torch.tensor(False, device=device))
    EMA([(online, expected)]).update(0.9)
    torch.testing.assert_close(target.weight, expected.weight)


@pytest.mark.parametrize("bad", [False, True])
def test_a_step_that_the_device_calls_bad_moves_nothing(device, bad):
    online, target = _pair(device)
    with torch.no_grad():
        online[0].weight.add_(float("nan") if bad else 1.0)
    before, expected = copy.deepcopy(target), copy.deepcopy(target)
    EMA([(online, target)]).update(0.9, unless=torch.tensor(bad, device=device))
    EMA([(online, expected)]).update(0.9)
    for name, value in (before if bad else expected).state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], value, msg=name)


def test_a_bfloat16_online_branch_is_averaged_in_float32(device):
    online, target = _pair(device)
    online = online.to(torch.bfloat16)
    with torch.no_grad():
        online[0].weight.fill_(1.0)
        target[0].weight.fill_(0.0)
    ema = EMA([(online, target)])
    for _ in range(10):
        ema.update(0.999)
    assert torch.allclose(target[0].weight, torch.full_like(target[0].weight, 1 - 0.999**10), rtol=1e-4)


def test_a_target_that_would_not_move_is_refused(device):
    online, target = _pair(device)
    with pytest.raises(ValueError, match="keep the target in float32"):
        EMA([(online, target.to(torch.bfloat16))])


def test_modules_of_other_structure_are_refused(device):
    online, _ = _pair(device)
    with pytest.raises(ValueError, match="names differ"):
        EMA([(online, nn.Linear(4, 4).to(device))])
    with pytest.raises(ValueError, match="online"):
        EMA([(nn.Linear(4, 4).to(device), nn.Linear(4, 5).to(device))])
