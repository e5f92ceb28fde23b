"""Errors on changed images, and mCE by hand."""

import pytest
import torch

from hjepa_eval.robustness.error import (
    ALEXNET,
    ALEXNET_CLEAN,
    mean_corruption_error,
    relative_corruption_error,
    right_on_changed,
)
from hjepa_eval.robustness.severity import Corruption

ERRORS = {"fog": [0.2, 0.3, 0.5], "snow": [0.4, 0.4, 0.6]}
REFERENCE = {"fog": [0.4, 0.6, 1.0], "snow": [0.5, 0.5, 0.4]}


def test_mean_corruption_error_is_the_published_formula():
    found = mean_corruption_error(ERRORS, REFERENCE)
    assert found.by_corruption == pytest.approx({"fog": 1.0 / 2.0, "snow": 1.4 / 1.4})
    assert found.mean == pytest.approx(0.75)
    assert mean_corruption_error(REFERENCE, REFERENCE).mean == pytest.approx(1)


def test_relative_error_takes_the_clean_errors_away():
    found = relative_corruption_error(ERRORS, REFERENCE, clean=0.1, reference_clean=0.2)
    assert found.by_corruption == pytest.approx({"fog": 0.7 / 1.4, "snow": 1.1 / 0.8})
    assert found.mean == pytest.approx((0.5 + 1.375) / 2)


def test_published_numbers_follow_from_alexnets():
    """ResNet-50 classifies 29.29 % of the images with Gaussian noise rightly and 39.06 % of those with low contrast."""
    errors = ALEXNET | {"gaussian_noise": (0.7071,) * 5, "contrast": (0.6094,) * 5}
    found = mean_corruption_error(errors, ALEXNET)
    assert found.by_corruption["gaussian_noise"] == pytest.approx(0.7977, abs=1e-4)
    assert found.by_corruption["contrast"] == pytest.approx(0.7143, abs=1e-4)
    assert list(ALEXNET) == list(Corruption)
    clean = {"clean": ALEXNET_CLEAN, "reference_clean": ALEXNET_CLEAN}
    assert relative_corruption_error(ALEXNET, ALEXNET, **clean).mean == pytest.approx(1)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"fog": [0.4, 0.6, 1.0]}, "same corruptions"),
        ({**REFERENCE, "fog": [0.4]}, "severities"),
        ({**REFERENCE, "fog": [0.0, 0.0, 0.0]}, "no more errors"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(reference, expected):
    with pytest.raises(ValueError, match=expected):
        mean_corruption_error(ERRORS, reference)


def test_each_image_is_counted_once_with_its_own_number():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 16, 16)
    labels = torch.arange(10)
    seen = []

    def change(pixels, samples):
        seen.extend(samples.tolist())
        return pixels + (samples % 2).to(torch.uint8).view(-1, 1, 1, 1)

    def predict(pixels):
        value = pixels[:, 0, 0, 0].long()
        return {"even": value, "never": value - 100}

    found = right_on_changed(predict, images, labels, change, batch_size=3)
    assert seen == list(range(10))
    assert found["even"].tolist() == [True, False] * 5
    assert not found["never"].any()
    assert right_on_changed(predict, images, labels)["even"].all()
    with pytest.raises(ValueError, match="labels"):
        right_on_changed(predict, images, labels[:3])
    with pytest.raises(ValueError, match="unknown"):
        right_on_changed(predict, images, labels - 1)
