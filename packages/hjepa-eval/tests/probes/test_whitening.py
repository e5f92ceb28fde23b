import numpy as np
import pytest
import torch

from hjepa_eval import Whitening, knn_accuracy
from hjepa_eval.probes import whitening


def rows(seed, n=300, width=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -3, width)
    return (torch.randn(n, width, generator=generator) @ mix.T + 3).to(dtype)


@pytest.mark.parametrize("floor", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("block", [64, 65_536])
def test_equals_the_formula_in_numpy(device, monkeypatch, floor, block):
    monkeypatch.setattr(whitening, "ROWS", block)
    train, test = rows(0), rows(1, n=130)
    found = Whitening.fit(train.to(device), floor=floor)(test.to(device)).cpu()
    x = train.double().numpy()
    covariance = np.cov(x.T, bias=True)
    values, vectors = np.linalg.eigh(covariance + floor * np.trace(covariance) / 7 * np.eye(7))
    expected = (test.double().numpy() - x.mean(0)) @ vectors @ np.diag(values**-0.5) @ vectors.T
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_without_a_floor_the_covariance_is_the_identity(device):
    train = rows(2, dtype=torch.float64).to(device)
    white = Whitening.fit(train, floor=0.0)(train)
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(7, dtype=torch.float64, device=device))
    torch.testing.assert_close(white.mean(0), torch.zeros(7, dtype=torch.float64, device=device), atol=1e-9, rtol=0)


def test_units_offsets_and_rotations_of_features_change_no_cosine(device):
    train, test = rows(3).to(device), rows(4).to(device)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(5)))[0].to(device)

    def cosines(first, second):
        unit = torch.nn.functional.normalize(Whitening.fit(first)(second).double(), dim=1)
        return unit @ unit.T

    changed = (100 * part @ turn + 4 for part in (train, test))
    torch.testing.assert_close(cosines(*changed), cosines(train, test), atol=1e-4, rtol=0)


def test_a_class_that_lies_in_a_small_direction_is_found(device):
    generator = torch.Generator().manual_seed(6)
    labels = torch.arange(400) % 2
    features = torch.randn(400, 45, generator=generator) * torch.tensor([0.4] + [20.0] * 4 + [0.01] * 40)
    features[:, 0] += 2 * labels
    bank, test = features[:300].to(device), features[300:].to(device)
    known, true = labels[:300].to(device), labels[300:].to(device)
    before = knn_accuracy(bank, known, test, true)[20]
    white = Whitening.fit(bank, floor=1e-3)
    after = knn_accuracy(white(bank), known, white(test), true)[20]
    # Without a floor the forty directions of noise count as much.
    full = Whitening.fit(bank, floor=0.0)
    assert before < 0.65 < 0.9 < after
    assert knn_accuracy(full(bank), known, full(test), true)[20] < after


def test_what_cannot_be_whitened(device):
    constant = rows(7).to(device)
    constant[:, 2] = 1.0
    assert Whitening.fit(constant)(constant).isfinite().all()
    with pytest.raises(ValueError, match="a floor above 0"):
        Whitening.fit(constant, floor=0.0)
    with pytest.raises(ValueError, match="a floor above 0"):
        Whitening.fit(rows(8, n=5).to(device), floor=0.0)
    same = torch.ones(4, 3, device=device)
    assert torch.equal(Whitening.fit(same)(same), 0 * same)
    with pytest.raises(ValueError, match="at least two samples"):
        Whitening.fit(torch.ones(1, 3, device=device))
    with pytest.raises(ValueError, match="NaN or infinity"):
        Whitening.fit(torch.full((4, 3), torch.nan, device=device))
    for floor in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="allowed: 0 and more"):
            Whitening.fit(rows(9).to(device), floor=floor)
    with pytest.raises(ValueError, match="the map is of"):
        Whitening.fit(rows(9).to(device))(torch.ones(4, 3, device=device))
