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
