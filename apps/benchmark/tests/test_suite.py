"""The suite on a tiny run: numbers, files, page."""

import json
from dataclasses import replace

import pytest
import torch

from hjepa_benchmark.runs import open_run
from hjepa_benchmark.suite.composites import _mean_iou
from hjepa_benchmark.suite.findings import find, read_right
from hjepa_benchmark.suite.plan import FULL
from hjepa_benchmark.suite.probes import random_crop
from hjepa_benchmark.suite.report import numbers_table, write_page
from hjepa_benchmark.suite.robustness import _ratio
from hjepa_benchmark.suite.run import measure
from hjepa_benchmark.suite.subjects import subjects
from hjepa_benchmark.suite.summary import latex, markdown
from hjepa_eval import AttentiveProbeConfig, FewShotConfig, HeadOptimizer, HeadTraining, Results, read_results
from hjepa_eval.robustness.error import mean_corruption_error
from hjepa_eval.robustness.severity import Corruption
from hjepa_pretrain.demo import CLASS_NAMES


def test_the_results_follow_the_schema_and_leave_the_runs_own_alone(measured):
    own = json.loads((measured / "results.json").read_text())
    found = read_results(measured / "benchmark" / "results.json")
    assert found.about["suite"] == "quick"
    assert found.about["images_seen"] == 32
    k = own["eval"]["k"]
    for row in own["rows"]:
        branch = {"trained": "target", "untrained": "untrained target", "pixels": "-"}[row["features"]]
        for metric, key in ((f"knn_{k}", f"knn_{k}"), ("linear", "linear")):
            one = find(found.measurements, metric, branch=branch, level=row["level"])
            assert one.value == pytest.approx(row[key]), (metric, branch, row["level"])
            assert one.low <= one.value <= one.high
            assert (one.n, one.n_train) == (row["n_test"], row["n_train"])


def test_every_level_has_its_measures(measured):
    found = read_results(measured / "benchmark" / "results.json").measurements
    metrics = {one.metric for one in found if one.name.branch == "target" and one.name.level == "0"}
    assert {"linear", "few_shot_5-shot", "rankme", "alpha_req", "mce", "error/clean", "error/fog/5"} <= metrics
    reference = find(found, "mce", branch="untrained target", level="encoder")
    assert (reference.value, reference.low, reference.high) == (1, 1, 1)
    clean, linear = (find(found, metric, branch="target", level="encoder") for metric in ("error/clean", "linear"))
    right = read_right(measured / "benchmark")["linear|target|encoder|mean"]
    assert float(right.double().mean()) == pytest.approx(linear.value)
    assert clean.n == 40


def test_the_page_stands_alone(measured):
    text = (measured / "benchmark" / "report.html").read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    for title in ("Summary", "Corruptions", "Confusion", "Features", "Attention", "Nearest neighbours", "Every number"):
        assert f"<h2>{title}</h2>" in text
    assert text.count("data:image/png") >= 8
    assert "mask_law" in text
    assert "hjepa-models" in text


@pytest.mark.slow
def test_the_full_suite(measured, tmp_path):
    plan = replace(
        FULL, corruptions=(Corruption.fog,), severities=(5,), corruption_images=20,
        few_shot=FewShotConfig(shots=(1,), shares=(), draws=2), composites=(60, 40),
        attentive=(AttentiveProbeConfig(blocks=2, training=HeadTraining(epochs=1, optimizer=HeadOptimizer.adamw)),),
    )  # fmt: skip
    run = open_run(measured)
    findings, pictures = measure(run, plan, {}, [])
    names = {one.metric for one in findings.measurements if one.name.branch == "target"}
    assert {"attentive_2", "map", "lidar", "alignment", "cka", "miou", "factor/place"} <= names
    assert {"factor/background", "dci_disentanglement", "width/2", "error/rotation/90", "error/occlusion/0.5"} <= names
    for one in findings.measurements:
        if one.metric in ("miou", "factor/class"):
            assert one.details["data"] == "composites"
    results = Results(model="m", data="d", measurements=findings.measurements, about={"suite": "full", "k": 20})
    write_page(tmp_path / "page.html", run, results, findings, pictures)
    assert "What each level keeps" in (tmp_path / "page.html").read_text()


def test_a_folder_of_other_images_is_classified(measured, tmp_path):
    from PIL import Image

    run = open_run(measured)
    for label in (1, 7):
        folder = tmp_path / "other" / CLASS_NAMES[label]
        folder.mkdir(parents=True)
        chosen = (run.test.labels == label).nonzero().flatten()[:3]
        for number in chosen.tolist():
            Image.fromarray(run.test.pixels[number].permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASS_NAMES))
    from hjepa_benchmark.suite.findings import Findings
    from hjepa_benchmark.suite.probes import probe_levels
    from hjepa_benchmark.suite.robustness import measure_folders

    subject = subjects(run)[0]
    train, test = (subject.extract(images, run.device) for images in (run.train, run.test))
    findings = Findings()
    plan = replace(FULL, few_shot=FewShotConfig(shots=(1,), shares=(), draws=2), retrieval=False)
    probes = probe_levels(subject, train, test, run, plan, findings)
    measure_folders({"other": tmp_path / "other"}, list(CLASS_NAMES), subject, probes, run, findings)
    one = find(findings.measurements, "folder/other", branch="target", level="encoder")
    assert one.n == 6
    assert one.details["classes"] == 2
    # Of two classes only: far above one in ten, whatever was learned.
    assert findings.right["folder/other|target|encoder|mean"].shape == (6,)


def test_the_bootstrapped_ratio_is_mce():
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(1, 2, 3, 4, generator=generator, dtype=torch.float64)
    own, base = ({str(c): means[0, side, c].tolist() for c in range(3)} for side in (0, 1))
    assert float(_ratio(means)) == pytest.approx(mean_corruption_error(own, base).mean)


def test_mean_iou_by_hand():
    confusion = torch.tensor([[[3.0, 1.0], [2.0, 4.0]]])
    assert float(_mean_iou(confusion)) == pytest.approx((3 / 6 + 4 / 7) / 2)


def test_crops_are_parts_of_the_image():
    ramp = torch.arange(32, dtype=torch.uint8).expand(5, 3, 32, 32)
    crops = random_crop(ramp, 0)
    assert crops.shape == ramp.shape
    assert torch.equal(crops, random_crop(ramp, 0))
    assert not torch.equal(crops, random_crop(ramp, 1))
    steps = crops[:, 0, 0].double().diff(dim=1)
    mirrored = steps.sum(dim=1) < 0
    assert 0 < int(mirrored.sum()) < 5 or len(mirrored) < 5
    assert bool((steps.sum(dim=1).abs() <= 32).all())
    assert torch.equal(random_crop(ramp[:2], 0), crops[:2])


def test_tables_can_be_pasted():
    header, rows = ["run", "level", "linear"], [["a_b", "0", "0.5 [0.4, 0.6]"], ["c|d", "1", "-"]]
    assert markdown(header, rows, 2).splitlines() == [
        "| run | level | linear |", "| --- | --- | ---: |", "| a_b | 0 | 0.5 [0.4, 0.6] |", "| c\\|d | 1 | - |",
    ]  # fmt: skip
    text = latex(header, rows, 2)
    assert "a\\_b & 0 & 0.5 {\\scriptsize [0.4, 0.6]} \\\\" in text
    assert text.count("{") == text.count("}")
    assert "0.5<br><small>[0.4, 0.6]</small></td>" in numbers_table(header, rows)
