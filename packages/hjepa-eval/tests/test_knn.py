import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_eval import knn_accuracy, knn_predict


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


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(5, 60),
    width=st.integers(2, 12),
    chunk=st.sampled_from([1, 7, None]),
)
def test_equals_a_naive_float64_loop(device, seed, n, width, chunk):
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(n, width, generator=generator) + 0.5
    test = torch.randn(13, width, generator=generator) + 0.5
    labels = torch.randint(0, 4, (n,), generator=generator)
    ks = (1, min(5, n), n)
    found = knn_predict(
        train.to(device), labels.to(device), test.to(device), ks=ks, temperature=0.07, chunk=chunk, num_classes=4
    )
    for k in ks:
        assert torch.equal(found[k].cpu(), naive(train, labels, test, k, 0.07, 4)), k


def test_near_duplicates_that_float32_cannot_rank_are_ranked(device):
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(1, 64, generator=generator).double()
    train = (test + 1e-4 * torch.randn(24, 64, generator=generator).double()).float()
    test = test.float()
    labels = torch.arange(24)
    found = knn_predict(train.to(device), labels.to(device), test.to(device), ks=(1,))
    assert torch.equal(found[1].cpu(), naive(train, labels, test, 1, 0.07, 24))


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
