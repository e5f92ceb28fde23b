"""What every probe says of features and labels that it cannot use, and of those that hang on a graph."""

import pytest
import torch

from hjepa_eval import (
    AttentiveProbe,
    AttentiveProbeConfig,
    FeatureSet,
    HeadTraining,
    LinearProbe,
    LogisticProbe,
    SegmentationProbe,
    average_precision,
    bottleneck_sweep,
    cka_interval,
    correspondence_accuracy,
    dci,
    factor_probe,
    few_shot,
    knn_predict,
    measure_unlabelled,
)

QUICK = HeadTraining(learning_rates=(1e-3,), weight_decays=(0.0,), epochs=1, batch_size=4)
STREAM = torch.Generator().manual_seed(0)
X, TEST_X = torch.randn(40, 8, generator=STREAM), torch.randn(12, 8, generator=STREAM)
Y, TEST_Y = torch.arange(40) % 4, torch.arange(12) % 4
PLACE, TEST_PLACE = X[:, 0], TEST_X[:, 0]
MASKS = (torch.arange(40 * 16).view(40, 4, 4) % 3).long()


def patches(x):
    return x[:, None].expand(-1, 4, -1)


def factors(x, y, place):
    return {"class": y, "place": place}


PROBES = {
    "knn": lambda x, test: knn_predict(x, Y, test)[20],
    "logistic": lambda x, test: LogisticProbe().fit(x, Y).predict(test),
    "linear": lambda x, test: LinearProbe(QUICK).fit({"a": x}, Y).predict({"a": test}),
    "few": lambda x, test: few_shot(x, Y, test, TEST_Y)[0].interval,
    "map": lambda x, test: average_precision(test, TEST_Y, x, Y),
    "attentive": lambda x, test: AttentiveProbe(AttentiveProbeConfig(training=QUICK)).fit(patches(x), Y).predict(
        patches(test)
    ),
    "segmentation": lambda x, test: SegmentationProbe(QUICK).fit(patches(x), MASKS, (2, 2)).predict(
        patches(test), (4, 4)
    ),
    "factors": lambda x, test: factor_probe(x, factors(x, Y, PLACE), test, factors(test, TEST_Y, TEST_PLACE)),
    "dci": lambda x, test: dci(x, factors(x, Y, PLACE), test, factors(test, TEST_Y, TEST_PLACE)).informativeness,
    "bottleneck": lambda x, test: bottleneck_sweep(x, Y, test, TEST_Y, widths=(2,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBES)
def test_features_of_an_encoder_that_ran_with_gradients_are_only_read(name):
    x, test = X.clone().requires_grad_(), TEST_X.clone().requires_grad_()
    found, expected = PROBES[name](x * 1, test * 1), PROBES[name](X, TEST_X)
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
    assert x.grad is None


def test_measures_only_read_too():
    x = X.clone().requires_grad_()
    assert cka_interval(x, x) == cka_interval(X, X)
    one, other = (measure_unlabelled(FeatureSet(values=values, labels=Y)) for values in (x, X))
    assert [m.value for m in one] == [m.value for m in other]


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("wrong", ["train", "test", "narrow", "empty"])
def test_features_that_no_probe_can_use_are_told_in_one_line(name, wrong):
    x, test = X.clone(), TEST_X.clone()
    if wrong == "empty":
        x, test = x[:, :0], test[:, :0]
    elif wrong == "narrow":
        test = test[:, :1]
    else:
        (x if wrong == "train" else test)[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity|\(\d+, .*\)|at least two") as raised:
        PROBES[name](x, test)
    assert "\n" not in str(raised.value)


def test_labels_of_few_shot_and_classes_of_factors_are_checked():
    with pytest.raises(ValueError, match=r"train_labels of torch\.float32"):
        few_shot(X, Y.float(), TEST_X, TEST_Y)
    assert (
        few_shot(X, Y > 1, TEST_X, TEST_Y > 1)[0].interval
        == few_shot(X, (Y > 1).long(), TEST_X, TEST_Y // 2)[0].interval
    )
    with pytest.raises(ValueError, match="factor 'class'"):
        dci(X, factors(X, Y - 1, PLACE), TEST_X, factors(TEST_X, TEST_Y, TEST_PLACE))


def test_masks_are_one_an_image_and_images_of_which_nothing_is_known_do_not_count():
    tokens, masks = patches(X), MASKS.clone()
    whole = SegmentationProbe(QUICK).fit(tokens[:20], masks[:20], (2, 2))
    masks[20:] = -1
    # The held-out part would hold unknown images only for some seed, and have no score.
    assert SegmentationProbe(QUICK).fit(tokens, masks, (2, 2)).candidates == whole.candidates
    for measure in (whole.confusion, whole.mean_iou):
        with pytest.raises(ValueError, match=r"masks \(1, 4, 4\) for 40 images"):
            measure(tokens, masks[:1])


@pytest.fixture(scope="module")
def fitted():
    """What measures test samples, by name."""
    segmentation = SegmentationProbe(QUICK).fit(patches(X), MASKS, (2, 2))
    linear = LinearProbe(QUICK).fit({"a": X}, Y)
    attentive = AttentiveProbe(AttentiveProbeConfig(training=QUICK)).fit(patches(X), Y)
    return {
        "logistic": LogisticProbe().fit(X, Y).accuracy,
        "linear": lambda x, y: linear.accuracy({"a": x}, y),
        "attentive": lambda x, y: attentive.accuracy(patches(x), y),
        "confusion": lambda x, y: segmentation.confusion(patches(x), MASKS[: len(y)]),
        "mean_iou": lambda x, y: segmentation.mean_iou(patches(x), MASKS[: len(y)]),
        "correspondence": lambda x, y: correspondence_accuracy(
            patches(x), patches(x), torch.zeros(len(y), 4).long(), (2, 2)
        ),
    }


@pytest.mark.parametrize("name", ["logistic", "linear", "attentive", "confusion", "mean_iou", "correspondence"])
@pytest.mark.parametrize("labels", [0, 5])
def test_no_sample_or_not_one_label_each_is_one_line(fitted, name, labels):
    with pytest.raises(ValueError, match=r"none|at least one|one for each") as raised:
        fitted[name](TEST_X[: 2 * labels], TEST_Y[:labels])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["linear", "attentive", "segmentation"])
def test_heads_are_trained_where_gradients_are_off(name):
    with torch.no_grad():
        found = PROBES[name](X, TEST_X)
    assert torch.equal(found, PROBES[name](X, TEST_X))


def test_the_heads_that_are_chosen_by_themselves_divide_every_width():
    tokens = torch.randn(8, 2, 200, generator=torch.Generator().manual_seed(0))
    probe = AttentiveProbe(AttentiveProbeConfig(training=QUICK)).fit(tokens, torch.arange(8) % 2)
    assert probe._head.attention.num_heads == 2
