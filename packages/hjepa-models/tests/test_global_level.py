from itertools import combinations

import pytest
import torch

from hjepa_models import GlobalConfig, GlobalObjective, ProjectorNorm
from hjepa_models.objectives import sigreg, vicreg_loss

SMALL = {"hidden_dim": 32, "out_dim": 8, "num_directions": 32}
ALL = list(combinations(range(4), 2))
# How many of four views are not small, and which pairs then agree.
PAIRS = [(None, ALL), (4, ALL), (3, ALL), (2, ALL[:-1]), (1, ALL[:3])]


@pytest.mark.parametrize("norm", list(ProjectorNorm))
@pytest.mark.parametrize("objective", list(GlobalObjective))
def test_gradients_reach_the_tokens_and_every_parameter(device, norm, objective):
    level = GlobalConfig(**SMALL, norm=norm, objective=objective).build(16, device=device)
    pooled = torch.randn(3, 10, 16, device=device, requires_grad=True)
    z = level(pooled)
    assert z.shape == (3, 10, 8)
    level.loss(z, 1).backward()
    assert pooled.grad.abs().sum() > 0
    assert all(p.grad is not None for p in level.parameters())


@pytest.mark.parametrize(("whole", "pairs"), PAIRS)
def test_nt_xent_is_the_mean_of_the_published_sums_over_pairs(device, whole, pairs):
    level = GlobalConfig(**SMALL, objective="nt_xent", temperature=0.3).build(16, device=device)
    z = torch.randn(4, 5, 8, device=device, dtype=torch.float64)
    sums = []
    for pair in pairs:
        rows = torch.nn.functional.normalize(z[list(pair)].flatten(0, 1), dim=-1)
        for i in range(10):
            similar = (rows @ rows[i] / 0.3).exp()
            sums.append(-(similar[(i + 5) % 10] / (similar.sum() - similar[i])).log())
    torch.testing.assert_close(level.loss(z, 0, whole), torch.stack(sums).mean())
    with pytest.raises(ValueError, match="1 view given; allowed: two or more"):
        level.loss(z[:1], 0)


@pytest.mark.parametrize("whole", [1, 2, 3, None])
def test_sigreg_loss_is_the_published_sum(device, whole):
    level = GlobalConfig(**SMALL, sigreg_lambda=0.2).build(16, device=device)
    z = torch.randn(3, 20, 8, device=device)
    center = z[:whole].mean(0)
    spread = sum((view - center).square().mean() for view in z) / 3
    keep = sum(sigreg(view, 7, 32) for view in z) / 3
    torch.testing.assert_close(level.loss(z, 7, whole), 0.8 * spread + 0.2 * keep)


@pytest.mark.parametrize("objective", [GlobalObjective.sigreg, GlobalObjective.vicreg])
def test_one_view_agrees_with_itself(device, objective):
    level = GlobalConfig(**SMALL, objective=objective).build(16, device=device)
    z = torch.randn(1, 20, 8, device=device)
    terms = vicreg_loss(z[0], z[0]) if objective is GlobalObjective.vicreg else 0.05 * sigreg(z[0], 7, 32)
    torch.testing.assert_close(level.loss(z, 7), terms)


@pytest.mark.parametrize(("whole", "pairs"), PAIRS)
def test_vicreg_takes_invariance_from_pairs_and_the_rest_from_all_views(device, whole, pairs):
    level = GlobalConfig(**SMALL, objective="vicreg").build(16, device=device)
    z = 0.5 * torch.randn(4, 20, 8, device=device)
    differences = torch.stack([(z[a] - z[b]).square().mean() for a, b in pairs])
    rest = vicreg_loss(z.flatten(0, 1), z.flatten(0, 1))
    torch.testing.assert_close(level.loss(z, 0, whole), 25 * differences.mean() + rest)


def test_equal_collapsed_views_agree_but_are_punished(device):
    # NT-Xent of rows that are all alike is no more than the logarithm of their number.
    for objective, times in {"sigreg": 20, "vicreg": 20, "nt_xent": 2}.items():
        level = GlobalConfig(**SMALL, objective=objective).build(16, device=device)
        collapsed = level.loss(torch.zeros(2, 256, 8, device=device), 0)
        spread = level.loss(torch.randn(1, 256, 8, device=device).expand(2, -1, -1), 0)
        assert collapsed > times * spread


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigreg_lambda": 1.5}, "allowed: 0 to 1"),
        ({"knots": 1}, "knots=1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"norm": "bach"}, "did you mean 'batch'"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        GlobalConfig(**fields)
