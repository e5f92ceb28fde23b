"""mCE and relative mCE of the suite, their intervals, and where they are undefined."""

import math
from dataclasses import replace

import pytest
import torch

from hjepa_benchmark.suite.findings import Findings, find
from hjepa_benchmark.suite.plan import QUICK
from hjepa_benchmark.suite.report import _corruptions
from hjepa_benchmark.suite.robustness import _mean_errors, _ratio
from hjepa_eval import FeatureName, Measurement
from hjepa_eval.robustness.error import mean_corruption_error, relative_corruption_error
from hjepa_eval.robustness.severity import Corruption


def test_the_bootstrapped_ratio_is_mce():
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(1, 2, 3, 4, generator=generator, dtype=torch.float64)
    own, base = ({str(c): means[0, side, c].tolist() for c in range(3)} for side in (0, 1))
    assert float(_ratio(means)) == pytest.approx(mean_corruption_error(own, base).mean)


def test_mean_errors_by_hand():
    """Two corruptions at two severities, errors of ten images each; the reference is hurt by both, or not by one."""
    metrics = ("error/clean", "error/fog/1", "error/fog/5", "error/snow/1", "error/snow/5")
    plan = replace(QUICK, corruptions=(Corruption.fog, Corruption.snow), severities=(1, 5))

    def wrong(*errors):
        return {metric: torch.arange(10).repeat(30) < n for metric, n in zip(metrics, errors, strict=True)}

    for reference, defined, mean_defined in (
        ((2, 4, 6, 5, 8), True, True),
        ((2, 4, 6, 2, 2), False, True),
        ((2, 4, 6, 0, 0), False, False),
    ):
        findings = Findings()
        names = [FeatureName(branch=branch, level=level, pooling="mean")
                 for branch, level in (("untrained online", "encoder"), ("online", "0"))]  # fmt: skip
        _mean_errors(dict(zip(names, (wrong(*reference), wrong(1, 2, 4, 3, 5)), strict=True)), plan, findings)
        found = {
            metric: find(findings.measurements, metric, subject="trained", level="0")
            for metric in ("mce", "relative_mce", "added_error")
        }
        own, base = ({"fog": row[1:3], "snow": row[3:]} for row in ((1, 2, 4, 3, 5), reference))
        if mean_defined:
            assert found["mce"].value == pytest.approx(mean_corruption_error(own, base).mean)
        else:
            assert math.isnan(found["mce"].value)
            assert found["mce"].method == "none"
            assert found["mce"].details["undefined"] == "the reference makes no errors under snow"
        assert found["added_error"].value == pytest.approx((1 + 3 + 2 + 4) / 4 / 10)
        if defined:
            by_hand = relative_corruption_error(own, base, clean=1, reference_clean=reference[0]).mean
            assert found["relative_mce"].value == pytest.approx(by_hand)
            assert found["relative_mce"].low < by_hand < found["relative_mce"].high
        else:
            assert math.isnan(found["relative_mce"].value)
            assert "loses nothing by snow" in found["relative_mce"].details["undefined"]


@pytest.mark.parametrize("lost", [4, 30])
def test_relative_mce_is_told_where_no_draw_of_the_reference_loses_nothing(lost):
    """In one of 55 draws none of four images of 200 that are lost by the change is there."""
    plan = replace(QUICK, corruptions=(Corruption.fog,), severities=(1,))
    images = torch.arange(200)
    clean = images < 60
    names = [FeatureName(branch=branch, level="encoder", pooling="mean") for branch in ("untrained online", "online")]
    changed = (images < 60 + lost, images < 70)
    errors = [{"error/clean": clean, "error/fog/1": wrong} for wrong in changed]
    findings = Findings()
    _mean_errors(dict(zip(names, errors, strict=True)), plan, findings)
    for subject, value in (("untrained", 1), ("trained", 10 / lost)):
        one = find(findings.measurements, "relative_mce", subject=subject, level="encoder")
        if lost == 4:
            assert math.isnan(one.value)
            assert (one.method, one.details["undefined"]) == ("none", "the reference loses nothing by fog")
        else:
            assert one.value == pytest.approx(value)
            assert one.low <= one.value <= one.high < 1.5


def test_the_page_says_which_mean_error_is_undefined_and_why():
    name = FeatureName(branch="target", level="0", pooling="mean")
    one = Measurement(metric="error/clean", name=name, value=0.5, n=9)
    measured = [one, *(replace(one, metric=metric) for metric in ("error/fog/1", "added_error"))]
    measured += [replace(one, metric="mce", value=math.nan, details={"undefined": "the one"}),
                 replace(one, metric="relative_mce", value=math.nan, details={"undefined": "the other"})]  # fmt: skip
    assert _corruptions(measured).note.endswith("mCE is undefined: the one. Relative mCE is undefined: the other.")
