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
    learned = ("registers", "table", "frequencies")  # tokens and positions
    for name in learned:
        module.register_parameter(name, nn.Parameter(torch.zeros(1, 4, 2, device=device)))
    for name in ("cell_logits", "maps"):
        module[name] = nn.ParameterList([torch.zeros(4, 2, device=device)])
    decay, rest = (_names(module, group) for group in parameter_groups(module))
    assert decay == {"tokenizer.weight", "maps.0"}
    assert rest == {*learned, "tokenizer.bias", "cell_logits.0"}


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


@pytest.mark.parametrize(
    "fields",
    [{"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"betas": (0.9, 0.9, 0.9)}, {"eps": 0.0}, {"eps": float("nan")}],
)
def test_a_wrong_optimizer_is_refused(fields):
    with pytest.raises(ValueError, match="allowed"):
        OptimizerConfig(**fields)


def _muon_module(device):
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 4)]), "head": nn.Linear(4, 3)}).to(device)


def _gradients(module):
    for number, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)


def test_muon_steps_the_matrices_of_blocks_and_adamw_the_rest(device):
    module, plain = _muon_module(device), _muon_module(device)
    before = module["blocks"][0].weight.detach().clone()
    for one, config in ((module, OptimizerConfig(kind="muon", muon_scale=2.0)), (plain, OptimizerConfig())):
        optimizer = config.build(one)
        set_rates(optimizer, learning_rate=0.1, weight_decay=0.5)
        _gradients(one)
        optimizer.step()
    for name in ("blocks.0.bias", "head.weight", "head.bias"):
        torch.testing.assert_close(module.get_parameter(name), plain.get_parameter(name))
    # The update is the gradient with its singular values near 1, times 0.2 sqrt(6), of a weight that has decayed.
    update = (before * (1 - 0.2 * 0.5) - module["blocks"][0].weight.detach()) / (0.2 * 0.2 * 6**0.5)
    singular = torch.linalg.svdvals(update.float().cpu())
    assert singular.min() > 0.4
    assert singular.max() < 1.4


def test_muon_is_that_of_torch_whatever_shapes_go_together(device):
    shapes = [(6, 4), (4, 6), (6, 2, 2), (8, 8), (6, 4), (4, 3, 2, 1), (4, 3, 2, 1)]
    kernels = [torch.full(shape, 0.1, device=device) for shape in shapes]
    matrices = [kernel.flatten(1) for kernel in kernels]
    modules = [nn.ParameterList(nn.Parameter(x.clone()) for x in given) for given in (kernels, matrices)]
    ours = OptimizerConfig(kind="muon", muon_names=("",), muon_momentum=0.9).build(modules[0])
    torchs = torch.optim.Muon(
        modules[1].parameters(), lr=0.1, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    set_rates(ours, learning_rate=0.1, weight_decay=0.3)
    for seed in range(4):
        for one in modules:
            torch.manual_seed(seed)
            for parameter in one:
                parameter.grad = torch.randn(parameter.shape).to(device)
        # A matrix without a gradient is left where it is.
        modules[0][1].grad = modules[1][1].grad = None if seed == 2 else modules[1][1].grad
        ours.step()
        torchs.step()
    for one, other in zip(*modules, strict=True):
        # On a CPU bit for bit; a GPU may add up products in another order.
        torch.testing.assert_close(one.flatten(1), other, rtol=0, atol=0 if device.type == "cpu" else 2e-3)
        assert (one - 0.1).abs().max() > 0.05
        mean, other_mean = (o.state[p]["momentum_buffer"] for o, p in ((ours, one), (torchs, other)))
        torch.testing.assert_close(mean.flatten(1), other_mean)


def test_muon_goes_on_from_its_state(device):
    whole, half = _muon_module(device), _muon_module(device)
    optimizers = [OptimizerConfig(kind="muon").build(module) for module in (whole, half)]
    for step in range(4):
        if step == 2:
            fresh = OptimizerConfig(kind="muon").build(half)
            fresh.load_state_dict(optimizers[1].state_dict())
            optimizers[1] = fresh
        for module, optimizer in zip((whole, half), optimizers, strict=True):
            set_rates(optimizer, learning_rate=0.1, weight_decay=0.0)
            _gradients(module)
            optimizer.step()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, half.get_parameter(name)), name


def test_muon_without_a_matrix_is_refused(device):
    with pytest.raises(ValueError, match="no trainable matrix"):
        OptimizerConfig(kind="muon").build(nn.Linear(2, 2).to(device))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lion", "lars"])
def test_lion_and_lars_leave_norms_and_biases_alone(device, kind):
    module = nn.Linear(3, 3).to(device)
    weight, bias = (parameter.detach().clone() for parameter in (module.weight, module.bias))
    optimizer = OptimizerConfig(kind=kind, betas=(0.9, 0.99), momentum=0.0, trust=0.01).build(module)
    set_rates(optimizer, learning_rate=0.1, weight_decay=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    gradient = torch.full_like(weight, 2.0)  # LARS of some releases changes the module's own in place
    optimizer.step()
    if kind == "lion":  # decoupled decay, then the sign of the gradient
        expected, expected_bias = weight * (1 - 0.1 * 0.5) - 0.1, bias - 0.1
    else:  # the gradient with its decay, scaled by the norms of the matrix; the bias plain
        whole = gradient + 0.5 * weight
        ratio = 0.01 * weight.norm() / (gradient.norm() + 0.5 * weight.norm())
        expected, expected_bias = weight - 0.1 * ratio * whole, bias - 0.1 * 2.0
    torch.testing.assert_close(module.weight.detach(), expected)
    torch.testing.assert_close(module.bias.detach(), expected_bias)


@pytest.mark.slow
def test_lars_adapts_matrices_without_decay_too(device):
    module = nn.Linear(3, 3).to(device)
    before = module.weight.detach().clone()
    optimizer = OptimizerConfig(kind="lars", momentum=0.0).build(module)
    set_rates(optimizer, learning_rate=1.0, weight_decay=0.0)
    module.weight.grad = torch.full_like(module.weight, 1000.0)
    optimizer.step()
    assert float((module.weight.detach() - before).norm() / before.norm()) == pytest.approx(0.001, rel=1e-3)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"optimizer.kind=lion: .*pip install 'timm'") as caught:
        OptimizerConfig(kind="lion").build(nn.Linear(2, 2))
    assert "\n" not in str(caught.value)
