import pytest
import torch
from torch import nn

from hjepa_eval import FeatureName, FeatureSet, concatenate, extract


def batches(sizes, device, width=3):
    count = 0
    for size in sizes:
        index = torch.arange(count, count + size, device=device)
        yield index[:, None].expand(size, width).float(), index % 5
        count += size


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(4).eval()

    def forward(self, x):
        x = self.drop(self.layer(x))
        return {"0": x, "1": self.frozen(x[:, :]).half()}


def test_every_sample_once_in_order_with_a_ragged_last_batch(device):
    sets = extract(lambda x: x * 2, batches((4, 4, 3), device), device=device, level="pixels", branch="none")
    found = sets["pixels"]
    assert found.values.device.type == "cpu"
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values[:, 0], 2.0 * torch.arange(11))
    assert torch.equal(found.labels, torch.arange(11) % 5)
    assert found.name == FeatureName(branch="none", level="pixels", pooling="-")


def test_several_levels_come_from_one_pass_in_eval_mode_and_modes_return(device):
    model = Levels().to(device)
    calls = []
    model.layer.register_forward_hook(lambda *_: calls.append(model.training))
    expected_modes = {name: part.training for name, part in model.named_modules()}
    sets = extract(model, batches((6, 2), device), branch="target", pooling="mean")
    assert calls == [False, False]
    assert {name: part.training for name, part in model.named_modules()} == expected_modes
    assert list(sets) == ["0", "1"]
    assert sets["1"].values.dtype == torch.float32
    assert str(sets["1"].name) == "branch=target level=1 pooling=mean"
    images = torch.cat([images for images, _ in batches((6, 2), device)])
    with torch.no_grad():
        torch.testing.assert_close(sets["0"].values, model.layer(images).cpu())


def test_bound_method_counts_as_its_module_and_modes_return_after_an_error(device):
    model = Levels().to(device)

    def broken(self, x):
        assert not self.training
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        extract(broken.__get__(model), batches((2,), device))
    assert model.training
    assert not model.frozen.training


def test_features_can_be_trained_on(device):
    sets = extract(Levels().to(device), batches((4,), device))
    probe = nn.Linear(4, 2)
    probe(sets["0"].values).sum().backward()
    assert probe.weight.grad is not None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[1:], "one row and one label"),
        (lambda x: x[:, :, None], "pool or flatten"),
        (lambda x: x / 0, "not finite"),
        (lambda x: {str(len(x)): x}, "earlier batches gave"),
    ],
)
def test_what_is_no_feature_matrix_is_refused_in_one_line(device, function, message):
    with pytest.raises(ValueError, match=message) as raised:
        extract(function, batches((4, 3), device))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("batch", [torch.zeros(2, 3), (torch.zeros(2, 3),), {"image": torch.zeros(2, 3)}])
def test_images_without_labels_are_refused(batch):
    with pytest.raises(ValueError, match=r"batches: .*\(images, labels\)"):
        extract(lambda x: x, [batch])


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        extract(lambda x: x, [])


def test_labelled_leaves_out_unknown_labels():
    known = FeatureSet(values=torch.arange(6.0).view(3, 2), labels=torch.tensor([0, -1, 2])).labelled()
    assert known.labels.tolist() == [0, 2]
    assert known.values[:, 0].tolist() == [0.0, 4.0]
    with pytest.raises(ValueError, match="one label a sample"):
        FeatureSet(values=torch.zeros(3, 2), labels=torch.zeros(2, dtype=torch.int64))


def test_sample_numbers_put_rows_in_order_and_leave_out_padding_and_repeats():
    rows = torch.arange(6.0)[:, None]
    batches = [
        (rows[[4, 2]], torch.tensor([4, 2]), torch.tensor([4, 2])),
        (rows[[0, 2, 5]], torch.tensor([0, 9, 5]), torch.tensor([0, 2, -1])),
    ]
    found = extract(lambda x: x, batches)["encoder"]
    assert found.values[:, 0].tolist() == [0, 2, 4]
    assert found.labels.tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="always or never"):
        extract(lambda x: x, [batches[0], batches[1][:2]])
    with pytest.raises(ValueError, match="padding"):
        extract(lambda x: x, [(rows[:1], torch.tensor([0]), torch.tensor([-1]))])


def test_features_side_by_side():
    labels = torch.tensor([0, 1])
    first, second = (
        FeatureSet(
            values=value * torch.ones(2, 2),
            labels=labels,
            name=FeatureName(branch="target", level=f"block{value}", pooling="mean"),
        )
        for value in (1, 2)
    )
    joined = concatenate([first, second])
    assert joined.values.tolist() == [[1, 1, 2, 2]] * 2
    assert str(joined.name) == "branch=target level=block1+block2 pooling=mean"
    second.labels = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="same samples"):
        concatenate([first, second])


def test_a_stream_may_fill_the_same_batch_again(device):
    def batches():
        images, labels, numbers = torch.empty(2, 3, device=device), torch.empty(2).long(), torch.empty(2).long()
        for step in range(3):
            yield images.fill_(step), labels.fill_(step), numbers.copy_(torch.tensor([2 * step, 2 * step + 1]))

    found = extract(lambda x: x.view(2, 3), batches())["encoder"]
    assert found.values[:, 0].tolist() == found.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_wrong_stream_or_function_is_told_at_the_first_batch(device):
    def batches(count):
        yield torch.zeros(2, 3, device=device), torch.zeros(2).long(), torch.arange(count)
        raise AssertionError("the first batch was taken")

    for count, function, message in (
        (2, lambda x: x[:, None], "pool or flatten"),
        (2, lambda x: x[:, 0], "pool or flatten"),
        (2, lambda x: [x], "features give list"),
        (3, lambda x: x, "sample numbers of shape"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            extract(function, batches(count))
        assert "\n" not in str(raised.value)


def test_two_levels_of_one_name_are_refused_and_none_is_lost():
    with pytest.raises(ValueError, match="two have one name"):
        extract(lambda x: {0: x, "0": 2 * x}, batches([4], "cpu"))


def test_a_module_that_takes_more_than_images_is_refused():
    attention = torch.nn.MultiheadAttention(4, 1)
    with pytest.raises(ValueError, match=r"MultiheadAttention\.forward is not for images alone \(missing .*'key'"):
        extract(attention, [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))])
