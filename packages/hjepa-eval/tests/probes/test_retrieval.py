import subprocess
import sys

import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_average_precision

from hjepa_eval import average_precision
from hjepa_eval.probes import retrieval


@pytest.mark.parametrize("elements", [1, 2**25])
def test_equals_torchmetrics_query_by_query(device, monkeypatch, elements):
    monkeypatch.setattr(retrieval, "ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(20, 6, generator=generator), torch.randn(50, 6, generator=generator)
    labels, gallery_labels = (torch.randint(0, 4, (n,), generator=generator) for n in (20, 50))
    found = average_precision(query.to(device), labels.to(device), gallery.to(device), gallery_labels.to(device)).cpu()
    for row, label, ours in zip(query, labels, found, strict=True):
        cosine = (
            torch.nn.functional.cosine_similarity(row[None].double(), gallery.double()) + 2
        )  # it counts positive scores only
        assert ours.item() == pytest.approx(
            retrieval_average_precision(cosine, gallery_labels == label).item(), abs=1e-6
        )


def test_a_query_is_no_hit_of_itself_and_without_hits_there_is_no_number(device):
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]], device=device)
    labels = torch.tensor([0, 1, 0], device=device)
    found = average_precision(rows, labels, rows, labels, leave_out_self=True).tolist()
    assert found[0] == pytest.approx(0.5)
    assert found[1] != found[1]
    with pytest.raises(ValueError, match="leave_out_self"):
        average_precision(rows[:2], labels[:2], rows, labels, leave_out_self=True)
    with pytest.raises(ValueError, match="one D"):
        average_precision(rows[:, :1], labels, rows, labels)


def test_copies_rank_in_the_order_of_the_gallery(device):
    """Where a matrix product rounds copies in different ways, their order is that of its blocks."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        gallery = torch.randn(5, 3 + seed, generator=generator)[torch.randint(0, 5, (37,), generator=generator)]
        gallery_labels = torch.randint(0, 3, (37,), generator=generator)
        query = torch.randn(4, 3 + seed, generator=generator)
        labels = torch.randint(0, 3, (4,), generator=generator)
        found = average_precision(query.to(device), labels.to(device), gallery.to(device), gallery_labels.to(device))
        for row, label, ours in zip(query.double(), labels, found.tolist(), strict=True):
            cosine = [float((row * other).sum() / row.norm() / other.norm()) for other in gallery.double()]
            hits = [bool(gallery_labels[i] == label) for i in sorted(range(37), key=lambda i: -cosine[i])]
            shares = [sum(hits[: r + 1]) / (r + 1) for r in range(37) if hits[r]]
            assert ours == pytest.approx(sum(shares) / len(shares), abs=1e-12)


@pytest.mark.slow
def test_memory_is_bounded():
    """Peak memory of a process of its own stays far below a copy of the gallery, which has 98 MiB."""
    script = """
import resource, torch
from hjepa_eval import average_precision
gallery, labels = torch.randn(100_000, 256), torch.arange(100_000) % 10
average_precision(gallery[:3], labels[:3], gallery[:50], labels[:50])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
average_precision(gallery[:3], labels[:3], gallery, labels)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 50


@pytest.mark.parametrize("scale", [2.0**-50, 2.0**-100])
def test_the_norm_of_features_does_not_matter(device, scale):
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(9, 6, generator=generator), torch.randn(50, 6, generator=generator)
    labels, gallery_labels = (torch.randint(0, 4, (n,), generator=generator).to(device) for n in (9, 50))
    small = scale * 2.0 ** torch.randint(-9, 9, (50, 1), generator=generator) * gallery
    found, expected = (
        average_precision(rows.to(device), labels, searched.to(device), gallery_labels)
        for rows, searched in ((scale * query, small), (query, gallery))
    )
    torch.testing.assert_close(found, expected)


def test_unknown_labels_are_no_class(device):
    rows, labels = torch.eye(3, device=device), torch.tensor([0, -1, -1], device=device)
    with pytest.raises(ValueError, match="query_labels"):
        average_precision(rows, labels, rows, labels.abs())
    with pytest.raises(ValueError, match="gallery_labels"):
        average_precision(rows, labels.abs(), rows, labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named(value):
    good, labels = torch.eye(3), torch.arange(3)
    broken = good.clone()
    broken[1, 2] = value
    with pytest.raises(ValueError, match="query: NaN or infinity"):
        average_precision(broken, labels, good, labels)
    with pytest.raises(ValueError, match="gallery: NaN or infinity"):
        average_precision(good, labels, broken, labels)
