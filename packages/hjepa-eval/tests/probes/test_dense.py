import pytest
import torch
from torch import nn

from hjepa_eval import SegmentationProbe, bootstrap, correspondence_accuracy, crop_matches, mean_iou
from hjepa_eval.probes.accuracy import split
from hjepa_eval.probes.heads import HeadTraining


def scenes(n, seed):
    """Four by four patches of three classes, whose tokens show the class; masks at four pixels a patch."""
    generator = torch.Generator().manual_seed(seed)
    patch = torch.randint(0, 3, (n, 4, 4), generator=generator)
    tokens = torch.eye(3, 8)[patch.flatten(1)] * 3 + torch.randn(n, 16, 8, generator=generator) + 2
    return tokens, patch.repeat_interleave(4, 1).repeat_interleave(4, 2)


def naive_iou(predicted, masks):
    scores = []
    for number in range(3):
        a, b = (predicted == number) & (masks >= 0), masks == number
        scores.append(float((a & b).sum() / (a | b).sum()))
    return sum(scores) / 3


def test_segmentation_learns_the_classes_and_counts_by_the_definition(device):
    (tokens, masks), (test_tokens, test_masks) = scenes(120, 0), scenes(60, 1)
    masks[:, 0, 0] = -1
    test_masks[:, :, 3] = -1
    config = HeadTraining(learning_rates=(1e-4, 3e-2), weight_decays=(0.0,), epochs=8, batch_size=16, optimizer="adamw")
    probe = SegmentationProbe(config).fit(tokens, masks, (4, 4), device=device)
    assert probe.chosen.learning_rate == 3e-2
    found = probe.mean_iou(test_tokens, test_masks)
    assert 0.5 < found < 0.99
    predicted = probe.predict(test_tokens, (16, 16))
    assert found == pytest.approx(naive_iou(predicted, test_masks), abs=1e-6)
    counts = probe.confusion(test_tokens, test_masks)
    assert counts.sum() == (test_masks >= 0).sum()

    interval = bootstrap(counts, mean_iou)
    assert interval.value == pytest.approx(found, abs=1e-6)
    assert interval.low < found < interval.high
    assert interval.n == 60


def test_segmentation_refuses_what_does_not_fit():
    tokens, masks = scenes(3, 0)
    with pytest.raises(ValueError, match="grid"):
        SegmentationProbe().fit(tokens, masks, (4, 5))
    with pytest.raises(ValueError, match="same images"):
        SegmentationProbe().fit(tokens, masks[:2], (4, 4))
    with pytest.raises(RuntimeError, match="fit"):
        SegmentationProbe().predict(tokens, (2, 2))


def test_matches_of_crops_are_the_same_places_of_an_image():
    """Real crops of an image that holds its own coordinates."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.stack((y, x)) + 0.5
    first, second = torch.tensor([[8.0, 4.0, 32.0, 40.0]]), torch.tensor([[0.0, 16.0, 48.0, 32.0]])
    flipped = torch.tensor([True])
    matches = crop_matches(first, second, (4, 4), second_flipped=flipped)[0]

    def patches(box, mirrored):
        top, left, height, width = (int(v) for v in box[0])
        crop = image[:, top : top + height, left : left + width]
        crop = crop.flip(2) if mirrored else crop
        return nn.functional.adaptive_avg_pool2d(crop, 4).flatten(1).T

    a, b = patches(first, False), patches(second, True)
    half = torch.tensor([48 / 8, 32 / 8])
    for centre, match in zip(a, matches, strict=True):
        inside = ((centre - b).abs() <= half).all(1).nonzero().flatten()
        assert bool(match >= 0) == bool(0 < centre[0] < 48 and 16 < centre[1] < 48)
        assert match < 0 or match in inside
    assert (matches >= 0).any()
    assert (matches < 0).any()


def test_correspondence_counts_right_patches_and_near_ones(device):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 9, 16, generator=generator)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in range(3)])
    second = torch.empty_like(tokens)
    for image in range(3):
        second[image, order[image]] = 2 * tokens[image]
    matches = order.clone()
    matches[0, :4] = -1
    matches[2] = -1
    exact = correspondence_accuracy(tokens.to(device), second.to(device), matches.to(device), (3, 3))
    assert exact[:2].tolist() == [1, 1]
    assert exact[2] != exact[2]
    shifted = torch.where(matches % 3 < 2, matches + 1, matches - 2)
    shifted = torch.where(matches >= 0, shifted, -1)
    wrong = correspondence_accuracy(tokens.to(device), second.to(device), shifted.to(device), (3, 3))
    assert wrong[:2].tolist() == [0, 0]
    near = correspondence_accuracy(tokens.to(device), second.to(device), shifted.to(device), (3, 3), tolerance=1)
    expected = [(matches[i][matches[i] >= 0] % 3 < 2).double().mean().item() for i in range(2)]
    assert near[:2].tolist() == pytest.approx(expected)
    sizes = 1e-14 * torch.rand(3, 9, 1, generator=generator)
    small = correspondence_accuracy(tokens.to(device), (sizes * second).to(device), matches.to(device), (3, 3))
    assert small[:2].tolist() == [1, 1]
    with pytest.raises(ValueError, match="one shape"):
        correspondence_accuracy(tokens, second[:, :4], matches, (3, 3))


QUICK = HeadTraining(learning_rates=(1e-3, 3e-2), weight_decays=(0.0,), epochs=2, batch_size=16, optimizer="adamw")


def test_a_part_without_images_is_counted_by_no_metric():
    tokens, masks = scenes(40, 0)
    probe = SegmentationProbe(QUICK).fit(tokens, masks, (4, 4))
    with pytest.raises(ValueError, match="none on any process"):
        probe.mean_iou(tokens[:0], masks[:0])
    with pytest.raises(ValueError, match="at least one image"):
        probe.confusion(tokens[:0], masks[:0])
    for measure in (probe.mean_iou, probe.confusion):
        with pytest.raises(ValueError, match="one for each"):
            measure(tokens, masks[:0])


def test_what_is_unknown_may_be_any_number_below_0_and_masks_of_any_type():
    tokens, masks = scenes(40, 0)
    whole = SegmentationProbe(QUICK).fit(tokens, masks, (4, 4))
    small = SegmentationProbe(QUICK).fit(tokens, masks.to(torch.uint8), (4, 4))
    assert small.candidates == whole.candidates
    masks[:, 0, 0], other = -1, masks.clone()
    other[:, 0, 0] = -100
    probe = SegmentationProbe(QUICK).fit(tokens, other, (4, 4))
    assert probe.candidates == SegmentationProbe(QUICK).fit(tokens, masks, (4, 4)).candidates
    assert probe.mean_iou(tokens, other) == probe.mean_iou(tokens, masks)
    assert torch.equal(probe.confusion(tokens, other), probe.confusion(tokens, masks))
    again = probe.fit(tokens, masks.flip(0), (4, 4)).candidates
    assert again == SegmentationProbe(QUICK).fit(tokens, masks.flip(0), (4, 4)).candidates
    with pytest.raises(ValueError, match="0 images have a known pixel"):
        SegmentationProbe(QUICK).fit(tokens, torch.full_like(masks, -1), (4, 4))


@pytest.mark.parametrize("refit", [False, True])
def test_the_chosen_head_is_trained_again_on_all_images(refit):
    """Two images of a class that the first round never sees, as they are held out."""
    tokens, masks = scenes(40, 0)
    held = split(40, 0.05, 0)[1]
    masks = masks.clamp_max(1)
    tokens[:, :, 7], masks[held] = 0.0, 2
    tokens[held, :, 7] = 9.0
    config = HeadTraining(
        learning_rates=(1e-1,), weight_decays=(0.0,), epochs=20, batch_size=40, optimizer="adamw", held_out=0.05,
        refit=refit,
    )  # fmt: skip
    probe = SegmentationProbe(config).fit(tokens, masks, (4, 4))
    assert bool((probe.predict(tokens[held], (16, 16)) == 2).all()) == refit


def test_mean_iou_leaves_out_classes_that_are_nowhere():
    confusion = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    assert mean_iou(confusion).item() == pytest.approx((3 / 6 + 4 / 7) / 2)
    both = torch.stack((confusion, torch.tensor([[0, 0, 0], [0, 5, 0], [0, 5, 0]])))
    assert mean_iou(both / 100).tolist() == pytest.approx([(3 / 6 + 4 / 7) / 2, (5 / 10 + 0) / 2])


def test_tokens_that_are_not_finite_are_named():
    good, matches = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4).long()
    for first, second, name in ((good / 0, good, "first"), (good, good * float("nan"), "second")):
        with pytest.raises(ValueError, match=f"{name}: NaN or infinity"):
            correspondence_accuracy(first, second, matches, (2, 2))
