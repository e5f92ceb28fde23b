"""What every objective owes: right gradients, half precision, autocast, one graph."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hjepa_models.canvas import Canvas
from hjepa_models.objectives import (
    Objective,
    cjepa_loss,
    disentanglement,
    info_nce,
    patch_discrimination,
    prediction_loss,
    sigreg,
    symlog_bins,
    two_hot,
    two_hot_loss,
    two_hot_mean,
    vicreg_loss,
    vicreg_terms,
)

WEIGHT = torch.tensor([[1.0, 0.5, 0.0, 0.2], [0.0, 1.0, 1.0, 0.7], [1.0, 1.0, 0.0, 0.0]])


def tokens(function):
    """A function of predicted and target tokens [3, 4, 5] and of their weight."""
    return lambda a, b: function(a, b, WEIGHT.to(a.device, a.dtype))


def distance(objective, log):
    return tokens(lambda a, b, weight: prediction_loss(objective, a, b, weight, 0.7, symlog=log))


def levels(a, b):
    weight = WEIGHT.to(a.device)
    return disentanglement([Canvas(a, weight, (2, 2)), Canvas(b[:, :1, :3], weight[:, 1:2], (1, 1))], 0.01)


def weighted_terms(a, weight):
    return vicreg_terms(a.flatten(0, 1), weight=weight.flatten())


def bins(a):
    return symlog_bins(1.5, 5, a.device)


# Every objective as a function of two sets of tokens [3, 4, 5].
OBJECTIVES = {
    **{f"{name}_{log}": distance(Objective(name), log) for name in ("smooth_l1", "l1", "l2") for log in (False, True)},
    "cosine": distance(Objective.cosine, False),
    "two_hot": tokens(lambda a, b, weight: two_hot_loss(a.unsqueeze(-1) * bins(a).to(a), b, bins(a), weight)),
    "two_hot_encoding": lambda a, b: two_hot(a, bins(a)).square().sum() + b.sum() * 0,
    "two_hot_mean": lambda a, b: two_hot_mean(a * b, bins(a)).square().sum(),
    "cjepa": tokens(lambda a, b, weight: cjepa_loss(a, b, weight, vicreg_weight=0.3)),
    "patches_image": tokens(lambda a, b, weight: patch_discrimination(a, b, 0.5, "image", weight)),
    "patches_batch": tokens(lambda a, b, weight: patch_discrimination(a, b, 0.5, "batch", weight)),
    "info_nce": lambda a, b: info_nce(a.flatten(0, 1), b.flatten(0, 1), 0.5),
    "vicreg": lambda a, b: vicreg_loss(a.flatten(0, 1), b.flatten(0, 1)),
    "vicreg_weighted": tokens(lambda a, b, weight: sum(weighted_terms(0.5 * a, weight)) + b.sum() * 0),
    "sigreg": lambda a, b: sigreg(torch.stack([a, b]).flatten(1, 2), 3, 6),
    "disentanglement": levels,
}


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]


def pair(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).to(device, dtype)
    return a.requires_grad_(), b.requires_grad_()


def test_the_gradient_is_that_of_finite_differences(device, objective):
    assert torch.autograd.gradcheck(objective, pair(device, torch.float64))


def test_half_precision_in_gives_a_finite_float32_loss_near_the_true_one(device, objective):
    a, b = pair(device, torch.bfloat16)
    loss = objective(a, b)
    loss.backward()
    assert loss.dtype == torch.float32
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()
    exact = objective(*pair(device))
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0.05)


def test_it_never_asks_the_host(device, objective):
    # Tensors without values: whatever reads one on the host fails.
    with FakeTensorMode(allow_non_fake_inputs=True):
        a, b = (torch.empty(3, 4, 5, device=device, requires_grad=True) for _ in range(2))
        loss = objective(a, b)
        loss.backward()
    assert loss.shape == ()
    assert a.grad.shape == a.shape


def test_autocast_does_not_touch_it(device, objective):
    a, b = pair(device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = objective(a, b)
    torch.testing.assert_close(inside, objective(a, b), rtol=1e-6, atol=1e-7)


def test_it_compiles_in_one_graph_with_the_same_gradients(device, objective):
    a, b = pair(device)
    c, d = pair(device)
    # The objectives share the code of a few lambdas, whose graphs would add up to the limit.
    torch.compiler.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    fast, plain = compiled(a, b), objective(c, d)
    fast.backward()
    plain.backward()
    torch.testing.assert_close(fast, plain)
    for x, y in ((a, c), (b, d)):
        torch.testing.assert_close(x.grad, y.grad)
