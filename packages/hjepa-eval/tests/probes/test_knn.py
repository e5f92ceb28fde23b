import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from hjepa_eval import knn_accuracy, knn_predict, nearest


def naive(train, labels, test, k, temperature, classes):
    """Float64 Python loop over the definition."""
    bank = train.double().tolist()
    predicted = []
    for row in test.double().tolist():
        norm = math.sqrt(sum(v * v for v in row))
        cosines = []
        for j, other in enumerate(bank):
            other_norm = math.sqrt(sum(v * v for v in other))
            cosines.append((sum(a * b for a, b in zip(row, other, strict=True)) / (norm * other_norm), j))
        votes = [0.0] * classes
        for cosine, j in sorted(cosines, key=lambda pair: (-pair[0], pair[1]))[:k]:
            votes[int(labels[j])] += math.exp(cosine / temperature)
        predicted.append(max(range(classes), key=lambda c: (votes[c], -c)))
    return torch.tensor(predicted)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(5, 60),
    width=st.integers(2, 12),
    distinct=st.sampled_from([1, 3, 1000]),
    noise=st.sampled_from([0.0, 1e-5, 1.0]),
    memory=st.sampled_from([1, 2_000, None]),
)
def test_equals_a_naive_float64_loop(device, seed, n, width, distinct, noise, memory):
    """With random features, with copies (ties of cosines and of votes) and with what float32 cannot tell apart."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(distinct, width, generator=generator)[torch.randint(0, distinct, (n,), generator=generator)]
    train = (places.double() + noise * torch.randn(n, width, generator=generator).double() + 0.5).double()
    test = torch.randn(13, width, generator=generator) + 0.5
    test[0] = train[0].float()
    labels = torch.randint(0, 4, (n,), generator=generator)
    ks = (1, min(5, n), n)
    found = knn_predict(
        train.to(device),
        labels.to(device),
        test.double().to(device),
        ks=ks,
        temperature=0.07,
        memory=memory,
        num_classes=4,
    )
    for k in ks:
        assert torch.equal(found[k].cpu(), naive(train, labels, test, k, 0.07, 4)), k


def test_near_duplicates_that_float32_cannot_rank_are_ranked(device):
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(1, 64, generator=generator).double()
    train = (test + 1e-4 * torch.randn(240, 64, generator=generator).double()).float()
    test = test.float()
    labels = torch.arange(240)
    found = knn_predict(train.to(device), labels.to(device), test.to(device), ks=(1,))
    assert torch.equal(found[1].cpu(), naive(train, labels, test, 1, 0.07, 240))


def test_neighbours_are_exact_where_candidates_are_more_than_are_kept(device):
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(1, 96, generator=generator).double()
    bank = centre + 1e-4 * torch.randn(700, 96, generator=generator).double()
    bank[500:] = torch.randn(200, 96, generator=generator).double()
    bank[100:200] = bank[0]
    rows = torch.cat((centre, bank[:5], torch.randn(4, 96, generator=generator).double()))
    exact = (rows[:, None] * bank).sum(-1) / (rows.norm(dim=1)[:, None] * bank.norm(dim=1))
    order = exact.sort(dim=1, descending=True, stable=True).indices[:, :30]
    cosine, index = nearest(bank.to(device), rows.to(device), 30)
    assert torch.equal(index.cpu(), order)
    torch.testing.assert_close(cosine.cpu(), exact.gather(1, order), rtol=0, atol=1e-14)


def test_of_copies_the_first_of_the_bank_are_nearest_and_of_equal_votes_the_lowest_class_wins(device):
    bank = torch.ones(500, 8, device=device)
    bank[7] = 2.0  # the same direction: the same cosine
    _, index = nearest(bank, torch.ones(3, 8, device=device), 5)
    assert index.tolist() == [[0, 1, 2, 3, 4]] * 3
    labels = torch.tensor([3, 1] * 250, device=device)
    assert knn_predict(bank, labels, bank[:1], ks=(1, 2, 3))[1].item() == 3
    assert knn_predict(bank, labels, bank[:1], ks=(2,))[2].item() == 1


class Watch(TorchFunctionMode):
    """Notes the precision of every matrix product."""

    def __init__(self, device):
        super().__init__()
        self.seen, self.device = [], device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in {"matmul", "__matmul__"}:
            self.seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled(self.device.type)))
        return function(*args, **(kwargs or {}))


def test_a_coarse_precision_of_products_changes_nothing(device):
    generator = torch.Generator().manual_seed(2)
    bank, rows = torch.randn(2000, 64, generator=generator), torch.randn(50, 64, generator=generator)
    expected = nearest(bank.to(device), rows.to(device), 20)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16), Watch(device) as watch:
            found = nearest(bank.to(device), rows.to(device), 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(watch.seen) == {("highest", False)}
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.mark.slow
def test_memory_is_bounded():
    """Peak memory of a process of its own, for plain and for collapsed features, whose neighbours float32 cannot find.

    It stays far below the similarities of all pairs, 120 MB in float32.
    """
    script = """
import resource, torch
from hjepa_eval import nearest
generator = torch.Generator().manual_seed(0)
bank, rows = torch.randn(30_000, 16, generator=generator), torch.randn(1_000, 16, generator=generator)
nearest(bank[:2000], rows[:100], 20, memory=2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest(bank, rows, 20, memory=2**22)
nearest(1 + 1e-7 * bank, rows[:50], 20, memory=2**22)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50e6


def test_the_norm_of_features_does_not_matter_and_the_nearest_one_weighs_most(device):
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]], device=device)
    labels = torch.tensor([0, 1, 1], device=device)
    test = torch.tensor([[100.0, 1.0]], device=device)
    # The two far neighbours are a majority, but exp(0.6 / T) is nothing beside exp(1 / T) at a low temperature.
    assert knn_predict(train, labels, test, ks=(3,), temperature=0.07)[3].item() == 0
    assert knn_predict(train, labels, test, ks=(3,), temperature=10.0)[3].item() == 1


def test_accuracy_counts_classes_that_only_the_test_has(device):
    train = torch.eye(3, device=device)
    labels = torch.arange(3, device=device)
    test_labels = torch.tensor([0, 1, 7], device=device)
    assert knn_accuracy(train, labels, train, test_labels, ks=(1,))[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (4,)}, "ks"),
        ({"ks": (0,)}, "ks"),
        ({"ks": ()}, "ks"),
        ({"train_labels": torch.tensor([0, 1, -1])}, "unknown"),
        ({"train_labels": torch.tensor([0, 1])}, "one label a row"),
        ({"test": torch.zeros(1, 3)}, "one width"),
    ],
)
def test_wrong_input_is_refused_in_one_line(change, message):
    arguments = {"train": torch.eye(3)[:, :2], "train_labels": torch.arange(3), "test": torch.zeros(1, 2), "ks": (1,)}
    with pytest.raises(ValueError, match=message) as raised:
        knn_predict(**{**arguments, **change})
    assert "\n" not in str(raised.value)


def test_accuracy_refuses_unknown_test_labels():
    with pytest.raises(ValueError, match="unknown"):
        knn_accuracy(torch.eye(2), torch.arange(2), torch.eye(2), torch.tensor([0, -1]), ks=(1,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named(device, value):
    good = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    broken, labels = good.clone(), torch.zeros(90, dtype=torch.int64, device=device)
    broken[3, 1] = value
    for train, test in ((good, broken), (broken, good)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            knn_predict(train.to(device), labels, test.to(device), ks=(5,))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_classes_may_be_of_any_integer_type(device, kind):
    rows, labels = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).to(device), torch.arange(30) % 2
    found = knn_predict(rows, labels.to(device, kind), rows, ks=(5,))[5]
    assert torch.equal(found, knn_predict(rows, labels.to(device), rows, ks=(5,))[5])
    with pytest.raises(ValueError, match="integers"):
        knn_predict(rows, labels.float().to(device), rows, ks=(5,))


def test_what_has_no_neighbours_is_refused():
    rows, labels = torch.eye(4), torch.arange(4)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature="):
            knn_predict(rows, labels, rows, ks=(2,), temperature=temperature)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k}"):
            nearest(rows, rows, k)
