"""The suite on a tiny run: numbers, files, page."""

import hashlib
import io
import json
import re
import shutil
import tracemalloc
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from hjepa_benchmark import charts
from hjepa_benchmark.cli import main
from hjepa_benchmark.runs import Measured, load_checkpoint, open_run, read_config
from hjepa_benchmark.suite import probes
from hjepa_benchmark.suite import run as suite_run
from hjepa_benchmark.suite.composites import compose
from hjepa_benchmark.suite.findings import Findings, find, images_hash, read_right
from hjepa_benchmark.suite.plan import FULL, PLANS, QUICK
from hjepa_benchmark.suite.probes import (
    compare_levels,
    compare_views,
    rank_levels,
)
from hjepa_benchmark.suite.report import Pictures, _confusion, numbers_table, write_page
from hjepa_benchmark.suite.run import measure
from hjepa_benchmark.suite.subjects import subjects
from hjepa_benchmark.suite.summary import latex, markdown
from hjepa_data import ShardSource
from hjepa_eval import (
    AttentiveProbeConfig,
    FeatureName,
    FeatureSet,
    FewShotConfig,
    HeadOptimizer,
    HeadTraining,
    Results,
    level_features,
    open_encoder,
    read_results,
)
from hjepa_eval.robustness.severity import Corruption
from hjepa_pretrain.demo import CLASS_NAMES, compose_demo
from hjepa_pretrain.demo.shards import write_demo_shards
from hjepa_pretrain.evaluation import Images
from hjepa_pretrain.model import load_run
from hjepa_pretrain.report.write import read_rows
from hjepa_pretrain.results import TRAINED


def test_the_results_follow_the_schema_and_leave_the_runs_own_alone(measured):
    own = read_results(measured / "results.json")
    found = read_results(measured / "benchmark" / "results.json")
    # Who may read the one may read the other.
    modes = {(measured / "benchmark" / name).stat().st_mode for name in ("results.json", "right.safetensors")}
    assert len(modes) == 1
    assert found.about["suite"] == "quick"
    assert found.about["images_seen"] == 32
    assert (found.model, found.data) == (own.model, own.data)
    for one in own.measurements:
        (other,) = [other for other in found.measurements if (other.metric, other.name) == (one.metric, one.name)]
        for key in ("value", "low", "high"):
            assert getattr(other, key) == pytest.approx(getattr(one, key)), one
        assert (other.method, other.n, other.n_train) == (one.method, one.n, one.n_train)
        assert one.low <= one.value <= one.high


def test_every_level_has_its_measures(measured):
    found = read_results(measured / "benchmark" / "results.json").measurements
    metrics = {one.metric for one in found if one.name.branch == "target" and one.name.level == "0"}
    assert {"linear", "few_shot_5-shot", "rankme", "alpha_req", "mce", "error/clean", "error/fog/5"} <= metrics
    reference = find(found, "mce", subject="untrained", level="encoder")
    assert (reference.value, reference.low, reference.high) == (1, 1, 1)
    clean, linear = (find(found, metric, subject="trained", level="encoder") for metric in ("error/clean", "linear"))
    right = read_right(measured / "benchmark")["linear|target|encoder|mean"]
    assert float(right.double().mean()) == pytest.approx(linear.value)
    assert clean.n == 40


def test_the_page_stands_alone(measured):
    text = (measured / "benchmark" / "report.html").read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    for title in (
        "Summary",
        "Without labels",
        "Corruptions",
        "Confusion",
        "Features",
        "Attention",
        "Nearest neighbours",
        "Every number",
    ):
        assert f"<h2>{title}</h2>" in text
    assert text.count("data:image/png") >= 3
    assert text.count("data:image/svg+xml") >= 4
    assert "mask_law" in text
    assert "hjepa-models" in text


def test_the_full_suite_is_whole():
    full = PLANS["full"]
    assert len(set(full.corruptions)) == 15
    assert full.severities == (1, 2, 3, 4, 5)
    assert full.ks == (10, 20, 100, 200)
    assert [probe.blocks for probe in full.attentive] == [1, 4]


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
    assert {"attentive_2", "map", "lidar", "alignment", "correspondence", "cka", "miou", "factor/place"} <= names
    assert {"factor/background", "dci_disentanglement", "width/2", "error/rotation/90", "error/occlusion/0.5"} <= names
    for one in findings.measurements:
        if one.metric != "relative_mce":
            assert one.low <= one.value <= one.high, one.metric
            assert one.method != "none", one.metric
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
    one = find(findings.measurements, "folder/other", subject="trained", level="encoder")
    assert one.n == 6
    assert one.details["classes"] == 2
    # Of two classes only: far above one in ten, whatever was learned.
    assert findings.right["folder/other|target|encoder|mean"].shape == (6,)


def test_composites_fill_the_images_of_the_run():
    square, wide = compose("eval", 6, (32, 32)), compose("eval", 6, (16, 32))
    assert (wide.images.pixels.shape, wide.masks.shape) == ((6, 3, 16, 32), (6, 16, 32))
    assert torch.equal(square.factors["place"], wide.factors["place"])
    shares = [one.masks.double().mean(dim=(1, 2)) for one in (square, wide)]
    assert (shares[0] - shares[1]).abs().max() < 0.05
    assert set(wide.masks.unique().tolist()) == {0, 1}


def test_confusion_counts_classes_that_the_test_set_lacks(run):
    opened = open_run(run)
    opened.test = Images(pixels=opened.test.pixels[:4], labels=torch.tensor([0, 0, 1, 1]))
    findings = Findings(predicted={(TRAINED, "encoder"): torch.tensor([0, 7, 1, 1])})
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "matrix", lambda values, *_, **__: drawn.append(values) or "")
        _confusion(opened, findings)
    assert drawn[0].shape == (8, 8)
    assert (drawn[0][0, 0], drawn[0][0, 7], drawn[0][1, 1], drawn[0][0, 1]) == (0.5, 0.5, 1, 0)


def test_of_many_classes_those_that_are_confused_most_are_told(run):
    opened = open_run(run)
    truth = torch.arange(30).repeat_interleave(4)
    predicted = truth.clone()
    predicted[7 * 4 : 7 * 4 + 3] = 11
    predicted[2 * 4] = 29
    opened.test = Images(pixels=opened.test.pixels[:1].expand(120, -1, -1, -1), labels=truth)
    body = _confusion(opened, Findings(predicted={(TRAINED, "encoder"): predicted})).body
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)]
    names = [opened.test.class_name(label) for label in (7, 11, 2, 29)]
    assert [row for row in rows if row] == [[*names[:2], "75 %", "3 of 4"], [*names[2:], "25 %", "1 of 4"]]
    right = _confusion(opened, Findings(predicted={(TRAINED, "encoder"): truth}))
    assert "No image" in right.note


def test_the_hash_of_images_reads_them_where_they_lie():
    images = Images(pixels=torch.arange(10**7).to(torch.uint8).view(10, 1, 1000, 1000), labels=torch.arange(10))
    expected = hashlib.sha256(images.pixels.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest()
    tracemalloc.start()
    assert images_hash(images) == expected[:32]
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_ranks_of_a_sorted_set_are_of_all_its_classes():
    """Of a folder of images the first thousands are of a few classes, here of two of five directions."""
    values = torch.eye(5).repeat_interleave(1_000, 0) + 1e-3 * torch.randn(5_000, 5, generator=torch.Generator())
    name = FeatureName(branch="target", level="0", pooling="mean")
    findings = Findings()
    rank_levels({"0": FeatureSet(values=values, labels=torch.arange(5).repeat_interleave(1_000), name=name)}, findings)
    assert find(findings.measurements, "rankme", subject="trained", level="0").value > 4.9


def test_a_run_is_measured_on_its_own_device_with_its_own_threads(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    shutil.copytree(run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    for threads, device, expected in ((3, "cpu", "cpu"), (2, "auto", "cuda")):
        text = config.replace("threads: null", f"threads: {threads}").replace("device: cpu", f"device: {device}")
        (tmp_path / "run" / "config.yaml").write_text(text)
        found = open_run(tmp_path / "run", Measured(train_samples=20, eval_samples=5))
        assert (found.device.type, asked.pop()) == (expected, threads)


@pytest.mark.slow
def test_a_run_without_labels_is_measured_by_what_needs_none(train, shards, tmp_path, capsys):
    source = ShardSource(shards / "train-*.tar")
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(source.read(number).image)
    flat = (
        "recipe=hjepa",
        "hjepa.pyramid.levels=1",
        "hjepa.level_weights.weights=[1.0]",
        "hjepa.targets=online",
        "hjepa.sigreg_weight=0.05",
    )
    run = train("unlabelled", *flat, f"data.train={tmp_path}", f"data.eval={tmp_path}")
    assert main(["suite=quick", str(run)]) == 0
    assert "no labels" in capsys.readouterr().err
    found = read_results(run / "benchmark" / "results.json")
    metrics = {one.metric for one in found.measurements}
    assert "rankme" in metrics
    assert "linear" not in metrics
    assert found.about["target_encoder"] is False
    assert {one.name.branch for one in found.measurements} == {"online", "untrained online"}
    text = (run / "benchmark" / "report.html").read_text()
    for title in ("Summary", "Features", "Attention", "Nearest neighbours"):
        assert f"<h2>{title}</h2>" in text
    assert "<h2>Corruptions</h2>" not in text
    assert main(["suite=quick", str(run), "--folder", f"other={tmp_path}", "--classes", str(tmp_path / "0.png")]) == 2


def test_the_steps_are_those_of_the_weights(run, tmp_path):
    """A run that goes on has a configuration of more steps, and rows of more, than its weights have behind them."""
    longer = tmp_path / "longer"
    shutil.copytree(run, longer)
    config = (longer / "config.yaml").read_text()
    (longer / "config.yaml").write_text(config.replace("steps: 2\n", "steps: 900\n"))
    with (longer / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 800, "train/step_ms": 1e6}) + "\n")
    opened = open_run(longer)
    assert (opened.config.run.steps, opened.steps) == (900, 2)
    assert max(row["step"] for row in read_rows(longer, opened.steps)) == 2
    with (longer / "metrics.jsonl").open("a") as file:
        file.write('{"step": 90')
    with pytest.raises(ValueError, match=r"metrics.jsonl: damaged"):
        read_rows(longer)
    (longer / "config.yaml").write_text(re.sub(r"eval: /.*", "eval: nowhere/eval-*.tar", config))
    with pytest.raises(ValueError, match=r"nowhere/eval-.*--train and --eval"):
        open_run(longer)
    for content in ("{", '{"step": 2, "rows": []}'):
        (longer / "results.json").write_text(content)
        with pytest.raises(ValueError, match=r"results.json: damaged, or an earlier version wrote it .*hjepa-pretrain"):
            open_run(longer)
    (longer / "results.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        open_run(longer)


def test_a_checkpoint_is_an_encoder_that_can_be_measured(run, tmp_path):
    (step,) = (run / "checkpoints").glob("step_*")
    kept, ended = open_encoder(step, load_folder=load_checkpoint), load_run(run, open_run(run).config)
    assert kept.state_dict().keys() == ended.state_dict().keys()
    for name, value in ended.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
    assert not kept.training
    other = shutil.copytree(run, tmp_path / "other")
    (other / "checkpoints" / step.name / "rank_00000.safetensors").write_bytes(b"damaged")
    for path, message in (
        (other / "checkpoints" / step.name, "no whole checkpoint"),
        (other / "checkpoints" / "step_9", "no whole checkpoint"),
        (tmp_path, "config.yaml"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            load_checkpoint(path)
        assert "\n" not in str(raised.value)


def test_tables_can_be_pasted():
    header, rows = ["run", "level", "linear"], [["a_b", "0", "0.5 [0.4, 0.6]"], ["c|d", "1", "-"]]
    assert markdown(header, rows, 2).splitlines() == [
        "| run | level | linear |", "| --- | --- | ---: |", "| a_b | 0 | 0.5 [0.4, 0.6] |", "| c\\|d | 1 | - |",
    ]  # fmt: skip
    assert latex(["α-ReQ"], [["1"]], 0).splitlines()[2] == "$\\alpha$-ReQ \\\\"
    text = latex(header, rows, 2)
    assert "a\\_b & 0 & 0.5 {\\scriptsize [0.4, 0.6]} \\\\" in text
    assert text.count("{") == text.count("}")
    assert "0.5<br><small>[0.4, 0.6]</small></td>" in numbers_table(header, rows)


def test_a_folder_with_brackets_is_printed_as_it_is(run, tmp_path, monkeypatch):
    folder = tmp_path / "a [red] run"
    shutil.copytree(run, folder)
    pictures = Pictures(trained=load_run(run, read_config(run)), shown=None, attention=None)
    monkeypatch.setattr(suite_run, "measure", lambda *_: (Findings(), pictures))
    monkeypatch.setattr(suite_run, "write_page", lambda *_: None)
    shown = io.StringIO()
    suite_run.run_suite(folder, console=Console(file=shown, width=300))
    assert shown.getvalue().count("a [red] run") == 3


def test_folders_and_classes_that_do_not_fit_are_told_before_anything_is_measured(run, tmp_path, capsys):
    (tmp_path / "others" / "strange").mkdir(parents=True)
    (tmp_path / "others" / "strange" / "0.png").write_bytes(b"")
    words = ["suite=quick", str(run), "--folder", f"o={tmp_path / 'others'}", "--classes", str(tmp_path / "c.txt")]
    for classes, message in (
        ([*CLASS_NAMES[:-1], CLASS_NAMES[0]], "9 names in 10 lines"),
        (CLASS_NAMES[:3], "3 names in 3 lines"),
        (CLASS_NAMES, "strange"),
    ):
        (tmp_path / "c.txt").write_text("\n".join(classes))
        assert main(words) == 2
        told = capsys.readouterr().err
        assert message in told
        assert "measuring" not in told


def test_few_labels_and_classes_without_training_images_do_not_end_a_suite(run, monkeypatch):
    opened = open_run(run)
    subject, findings = subjects(opened)[0], Findings()
    opened.train.labels[4:] = -1
    monkeypatch.setattr(probes, "_ATTENTIVE", 4)
    quick = HeadTraining(learning_rates=(1e-3,), weight_decays=(0.0,), epochs=1, optimizer=HeadOptimizer.adamw)
    probes.probe_tokens(subject, opened, [AttentiveProbeConfig(training=quick)], findings)
    assert [(one.metric, one.n_train, one.n) for one in findings.measurements] == [("attentive_1", 4, 60)]
    opened.train.labels[:], opened.test.labels[:] = 0, 1
    train, test = (subject.extract(images, opened.device) for images in (opened.train, opened.test))
    plan = replace(QUICK, few_shot=FewShotConfig(shots=(1,), shares=(), draws=2), retrieval=True)
    probes.probe_levels(subject, train, test, opened, plan, findings)
    assert "map" not in {one.metric for one in findings.measurements}
    assert find(findings.measurements, "linear", subject=TRAINED, level="encoder").value == 0


@pytest.fixture(scope="module")
def small(train):
    """A run with levels that are vectors, and few images."""
    levels = ("hjepa.encoder.stem=overlap", "hjepa.global_level.stem_maps=1", "hjepa.global_level.pool_heads=2")
    few = ("eval.eval_samples=12", "eval.k=30")
    return train("small", "recipe=hjepa_global", *levels, *few)


def test_pooling_is_none_where_the_model_gives_a_vector(small):
    opened = open_run(small)
    vectors = ("map0", "pooled", "all", "global")
    expected = {level: "mean" for level in ("encoder", "0", "1")} | dict.fromkeys(vectors, "none")
    for subject in subjects(opened)[:2]:
        sets = subject.extract(opened.train, opened.device)
        assert {level: features.name.pooling for level, features in sets.items()} == expected
        assert {features.name.branch for features in sets.values()} == {subject.branch}
        assert subject.names(opened.train, opened.device) == {level: one.name for level, one in sets.items()}
    # The names of hjepa-eval, so that results merge.
    theirs = level_features(subjects(opened)[0].model, branches=("online",))(torch.zeros(1, 3, 32, 32))
    assert {name.level: name.pooling for name in theirs} == expected
    findings = Findings()
    compare_levels(sets, findings)
    poolings = {one.name.level: one.name.pooling for one in findings.measurements}
    joined = {"0 - encoder": "mean", "map0 - encoder": "none+mean", "pooled - map0": "none"}
    assert joined.items() <= poolings.items()


def test_few_images_leave_out_what_needs_more_and_say_so(small, tmp_path, capsys):
    write_demo_shards(compose_demo("train", 24, seed=3), tmp_path, "train")
    train = f"{tmp_path}/train-*.tar"
    opened, findings = open_run(small, Measured(train=train)), Findings()
    compare_views(subjects(opened)[0], opened, findings)
    assert not findings.measurements
    assert main(["suite=quick", str(small), "--train", train]) == 0
    told = capsys.readouterr()
    found = read_results(small / "benchmark" / "results.json")
    smallest = int(opened.train.labels.unique(return_counts=True)[1].min())
    assert smallest < 5
    left_out = "kNN k=30, 5-shot, 10-shot: 24 labelled training images, "
    left_out += f"{smallest} of the smallest class, are too few"
    assert found.about["left_out"] == left_out
    assert (found.about["data.train"], found.about["given"]) == (train, "data.train")
    assert told.err.count(f"measuring: left out {left_out}\n") == 1
    assert f"left out {left_out}" in " ".join(told.out.split())
    assert f"left out {left_out}" in (small / "benchmark" / "report.html").read_text()
    shot = find(found.measurements, "few_shot_1-shot", subject=TRAINED, level="pooled")
    assert (shot.method, shot.n, shot.details["draws"]) == ("draws", 12, 5)
    assert {one.name.pooling for one in found.measurements if one.name.level == "pooled"} == {"none"}


def test_latex_shows_every_sign_of_a_name():
    assert "a\\{b\\}\\$\\_c\\textbackslash{}d &" in latex(["run", "x"], [["a{b}$_c\\d", "1"]], 1)
