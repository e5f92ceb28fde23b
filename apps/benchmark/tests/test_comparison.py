"""Runs side by side."""

import json
import math
import shutil
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from hjepa_benchmark import charts
from hjepa_benchmark.cli import main
from hjepa_benchmark.comparison import run as comparing
from hjepa_benchmark.comparison import sweep as sweeping
from hjepa_benchmark.comparison.compare import (
    Candidate,
    curve,
    differing_settings,
    group_by_settings,
    group_interval,
    paired_differences,
    read_candidates,
)
from hjepa_benchmark.comparison.run import _groups, _metrics, _missing, _notes, show
from hjepa_benchmark.comparison.sweep import combinations
from hjepa_benchmark.runs import Measured
from hjepa_benchmark.suite.report import error_panels
from hjepa_benchmark.suite.summary import title_of
from hjepa_eval import FeatureName, Measurement, Results
from hjepa_pretrain.cli import main as pretrain

NAME = FeatureName(branch="target", level="encoder", pooling="mean")


def candidate(name, right, *, samples="same", rows=(), branch="target", **settings):
    right = torch.tensor(right)
    features = replace(NAME, branch=branch)
    one = Measurement(metric="linear", name=features, value=float(right.double().mean()), n=len(right))
    results = Results(model=name, data="d", measurements=[one], about={"test_samples": samples})
    return Candidate(
        name=name, folder=None, results=results, right={f"linear|{branch}|encoder|mean": right},
        settings={"data.batch_size": 4, "run.dir": name, **settings}, rows=list(rows),
    )  # fmt: skip


def test_differences_are_paired():
    first = candidate("a", [True] * 50 + [False] * 50)
    # Of a run without a moving average, whose encoder is another branch.
    better = candidate("b", [True] * 60 + [False] * 40, branch="online")
    (one,) = paired_differences([first, better], ["linear"])
    assert one.interval.value == pytest.approx(0.1)
    # Ten of a hundred changed, all for the better: unpaired intervals of 0.5 and 0.6 would overlap.
    assert one.interval.low > 0.03
    other = candidate("c", [True] * 100, samples="other")
    assert paired_differences([first, other], ["linear"]) == []
    assert _notes([first, other], []) == [
        "c: tested on other images than a; no paired difference. Do not compare the numbers."
    ]
    assert "another seed" in _notes([first, better], [one])[0]
    for setting in ("run.seed", "model", "hjepa.encoder.depth"):
        assert "mCE is over the untrained encoder" in _notes([first, candidate("d", [True], **{setting: 1})], [])[-1]


def test_levels_match_whatever_an_earlier_version_called_their_pooling():
    earlier, later = candidate("a", [False] * 20), candidate("b", [True] * 20)
    for run, pooling in ((earlier, "mean"), (later, "none")):
        (one,), right = run.results.measurements, run.right["linear|target|encoder|mean"]
        run.results.measurements[:] = [replace(one, name=replace(NAME, level="pooled", pooling=pooling))]
        run.right = {f"linear|target|pooled|{pooling}": right}
    for pair, gain in (((earlier, later), 1), ((later, earlier), -1)):
        (found,) = paired_differences(pair, ["linear"])
        assert (found.level, found.interval.value) == ("pooled", gain)


@pytest.mark.parametrize("other", [(15, 3, 50), (5, 1, 50), (5, 3, 1_000)])
def test_mce_over_other_changes_or_images_is_noted(other):
    runs = [candidate(name, [True]) for name in "abcd"]
    for run, (corruptions, severities, images) in zip(runs[1:], ((5, 3, 50), other, (5, 3, 50)), strict=True):
        details = {"corruptions": corruptions, "severities": severities}
        run.results.measurements.append(Measurement(metric="mce", name=NAME, value=0.9, n=images, details=details))
    # The first one has no mCE.
    (note,) = _notes(runs, [])
    assert "over 5 corruptions at 3 severities of 50 images in b; " in note
    assert f"{other[0]} corruptions at {other[1]} severities of {other[2]:,} images in c; " in note
    assert "Do not compare it, nor what is added by corruptions, of c with that of b; " in note
    assert "same --suite and --corruption-images" in note
    assert _notes([runs[0], runs[1], runs[3]], []) == []


@pytest.mark.parametrize(
    ("images", "seconds", "told"),
    [(1000, 300.0, False), (300, 100.0, False), (300, 30.0, True), (300, None, True), (None, 30.0, True)],
)
def test_another_budget_is_noted_unless_images_or_time_are_equal(images, seconds, told):
    runs = [candidate(name, [True]) for name in "ab"]
    for run, costs in zip(runs, ((1050, 105.0), (images, seconds)), strict=True):
        run.results.about.update(zip(("images_seen", "training_seconds"), costs, strict=True))
    notes = [note for note in _notes(runs, []) if note.startswith("b: trained neither")]
    assert len(notes) == told
    assert not any("budget" in note for note in _notes([runs[0], runs[0]], []))


def test_runs_without_labels_are_grouped_too():
    runs = [candidate(f"{seed}", [True], **{"run.seed": seed}) for seed in range(3)]
    for run in runs:
        run.results.measurements[:] = [Measurement(metric="rankme", name=NAME, value=5.0, n=9)]
    assert _groups(group_by_settings(runs), _metrics(runs)) == (
        ["settings", "seeds", "level", "RankMe"],
        [["all", "3", "encoder", "5.000 [5.000, 5.000]"]],
    )


def test_every_run_shows_its_own_number_of_neighbours():
    runs = [candidate(f"k{k}", [True], **{"eval.k": 7}) for k in (3, 20)]
    for run, k in zip(runs, (3, 20), strict=True):
        run.results.about["k"] = k
        for metric in (f"knn_{k}", f"white_knn_{k}"):
            run.results.measurements.append(Measurement(metric=metric, name=NAME, value=0.5, n=9))
    assert _metrics(runs) == ["knn_3", "white_knn_3", "knn_20", "white_knn_20", "linear"]
    assert [title_of(metric) for metric in _metrics(runs)[:2]] == ["kNN k=3", "whitened k=3"]


def test_a_run_has_one_colour_in_all_pictures_and_corruptions_come_first(monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "vectors", lambda figure, _: drawn.append(figure) or plt.close(figure) or "")
    one = Measurement(metric="error/x", name=NAME, value=0.5, n=9)
    labelled = [
        (run, replace(one, metric=f"error/{change}"))
        for run, change in (("b", "occlusion/0.1"), ("b", "fog/1"), ("a", "fog/3"), ("b", "gaussian_noise/5"))
    ]
    panels = error_panels(labelled)
    assert list(panels) == ["gaussian noise", "fog", "occlusion"]
    charts.progress({"a": [(0, 1)], "b": [(0, 2)]}, "", "")
    charts.lines(panels, "", "", order=["a", "b"])
    colours = [
        {line.get_label(): line.get_color() for axis in figure.axes for line in axis.get_lines()} for figure in drawn
    ]
    assert colours[0] == colours[1] == {"a": charts.COLORS[0], "b": charts.COLORS[1]}


def test_bars_leave_out_a_series_without_numbers(monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "vectors", lambda figure, _: drawn.append(figure.axes[0]) or plt.close(figure) or "")
    one = Measurement(metric="white_knn_20", name=NAME, value=0.5, n=9)
    full = {"trained": [one, one], "untrained": [one, one]}
    charts.bars(["encoder", "0"], {"pixels": [None, None], **full}, "", "")
    charts.bars(["encoder", "0"], full, "", "")
    first, second = drawn
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in drawn]
    assert legends == [["trained", "untrained"]] * 2
    places = [[(bar.get_x(), bar.get_width()) for bar in axes.patches] for axes in drawn]
    assert places[0] == places[1]
    assert first.patches[0].get_facecolor() == second.patches[2].get_facecolor()


def test_groups_are_runs_that_differ_in_the_seed_alone():
    runs = [
        candidate(f"{rate}{seed}", [True] * (5 + seed) + [False] * (5 - seed),
                  **{"run.seed": seed, "lr": rate, "schedule": rate, "equal": 1})
        for rate in ("low", "high") for seed in (0, 1, 2)
    ]  # fmt: skip
    assert set(differing_settings(runs)) == {"run.seed", "lr", "schedule"}
    groups = group_by_settings(runs)
    assert {label: len(group) for label, group in groups.items()} == {"lr=low": 3, "lr=high": 3}
    one = group_interval(groups["lr=low"], "linear", "encoder")
    assert (one.value, one.method, one.n) == (pytest.approx(0.6), "seeds", 3)
    assert one.low == pytest.approx(0.6 - 4.303 * 0.1 / 3**0.5)
    assert group_interval(groups["lr=low"][:1], "linear", "encoder").method == "none"
    assert list(group_by_settings(runs[:3])) == ["all"]


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0)])
def test_runs_of_several_seeds_are_put_together_wherever_they_were_trained(seeds, tmp_path, capsys, monkeypatch):
    runs = [
        candidate(name, [True] * good + [False] * (10 - good), **{"run.seed": seed})
        for name, good, seed in zip("ab", (5, 7), seeds, strict=True)
    ]
    monkeypatch.setattr(comparing, "measure_missing", lambda folders, suite: None)
    monkeypatch.setattr(comparing, "read_candidates", lambda folders: runs)
    comparing.compare_runs([tmp_path, tmp_path], page=None, output=tmp_path / "numbers.json")
    groups = json.loads((tmp_path / "numbers.json").read_text())["groups"]
    if len(set(seeds)) == 1:
        assert groups == []
        return
    assert "| all | 2 | encoder | 0.600 " in capsys.readouterr().out
    (group,) = groups
    (one,) = group["results"]
    assert (group["seeds"], one["metric"], one["value"], one["n"]) == ([0, 1], "linear", pytest.approx(0.6), 2)
    assert one["low"] == pytest.approx(0.6 - 12.706 * 0.1, abs=1e-3)


@pytest.mark.parametrize("change", ["missing", "images", "learned", "severities", "n", None])
def test_means_over_seeds_are_of_numbers_that_all_have_of_the_same_images(change, tmp_path, capsys):
    runs = [candidate(str(seed), [True] * (5 + seed), **{"run.seed": seed}) for seed in range(3)]
    for seed, run in enumerate(runs):
        run.results.measurements.append(Measurement(metric="rankme", name=NAME, value=5.0, n=9))
        other = change if seed == 2 else None
        details = {"corruptions": 5, "severities": 1 if other == "severities" else 3}
        one = Measurement(metric="mce", name=NAME, value=0.9, n=7 if other == "n" else 9, details=details)
        run.results.measurements[:1] = [] if other == "missing" else [one]
        run.results.about["test_samples"] = str(other == "images")
        run.results.about["train_samples"] = str(other == "learned")
    show(runs, groups=group_by_settings(runs), page_file=None, output=tmp_path / "j")
    (group,) = json.loads((tmp_path / "j").read_text())["groups"]
    means = {one["metric"] for one in group["results"]}
    said = capsys.readouterr().out
    assert means == ({"rankme", "mce"} if change is None else set() if change in ("images", "learned") else {"rankme"})
    assert ("mCE has no mean where a seed lacks it" in said) == (change is not None)
    assert f"| all | 3 | encoder | {'5.000 [5.000, 5.000]' if 'rankme' in means else '-'} |" in said


def test_a_copy_is_no_other_seed():
    runs = [
        candidate(name, [True] * good + [False] * (10 - good), **{"run.seed": seed})
        for name, good, seed in (("a", 5, 0), ("copy of a", 5, 0), ("b", 7, 1))
    ]
    one = group_interval(runs, "linear", "encoder")
    assert (one.value, one.n) == (pytest.approx(0.6), 2)
    assert one.low == pytest.approx(0.6 - 12.706 * 0.1, abs=1e-3)
    assert group_interval(runs[:2], "linear", "encoder").method == "none"
    assert [row[:2] for row in _groups({"all": runs}, ["linear"])[1]] == [["all", "2"]]


@pytest.mark.parametrize("command", ["hjepa-pretrain", "hjepa-pretrain trainer.learning_rate.warmup_steps=1,2"])
def test_seeds_of_equal_time_are_one_group_whatever_their_steps(command):
    runs = [
        candidate(f"{recipe}{seed}", [True], **{
            "recipe": recipe, "run.seed": seed, "run.train_time": "5m", "run.steps": 1000 * (2 + rank) + seed,
            "trainer.learning_rate.warmup_steps": 10 * rank + seed, "provenance": [{"command": command}],
        })
        for rank, recipe in enumerate(("hjepa", "simclr")) for seed in (0, 1)
    ]  # fmt: skip
    assert "run.steps" in differing_settings(runs)
    chosen = "warmup_steps" in command
    assert [len(group) for group in group_by_settings(runs).values()] == ([1] * 4 if chosen else [2, 2])
    given = [replace(run, settings={**run.settings, "run.train_time": None}) for run in runs]
    assert len(group_by_settings(given)) == 4


def test_curves_over_images_and_seconds():
    rows = [{"step": 2, "train/step_ms": 500.0}, {"step": 4, "train/step_ms": 250.0, "eval/x": 0.3}]
    run = candidate("a", [True], rows=rows)
    assert curve(run, "eval/x", seconds=False) == [(16, 0.3)]
    assert curve(run, "eval/x", seconds=True) == [(pytest.approx(1.5), 0.3)]


@pytest.mark.slow
def test_compare_measures_what_is_missing(measured, train, tmp_path, capsys):
    run = measured
    levels = ("recipe=hjepa", "hjepa.pyramid.levels=2", "hjepa.level_weights.weights=[1.0,0.7]")
    other = train("other", *levels, "run.seed=1", "trainer.learning_rate.value=0.01")
    before = (run / "benchmark" / "results.json").read_bytes()
    words = ["compare", str(run), str(other), "--out", str(tmp_path / "c.html"), "--json", str(tmp_path / "c.json")]
    capsys.readouterr()
    assert main(words) == 0
    assert (run / "benchmark" / "results.json").read_bytes() == before
    assert (other / "benchmark" / "results.json").is_file()
    printed = capsys.readouterr().out
    assert "| trainer.learning_rate.value |" in printed
    assert "Difference to run, same samples" in printed
    assert "report: " not in printed  # what the suite shows goes elsewhere: the output is Markdown
    found = json.loads((tmp_path / "c.json").read_text())
    assert [one["name"] for one in found["runs"]] == ["run", "other"]
    assert found["settings"]["run.seed"] == ["0", "1"]
    assert "run.dir" not in found["settings"]
    by_hand = {one["metric"]: one["value"] for one in found["runs"][1]["results"] if one["level"] == "encoder"}
    first = {one["metric"]: one["value"] for one in found["runs"][0]["results"] if one["level"] == "encoder"}
    linear = next(one for one in found["differences"] if (one["metric"], one["level"]) == ("linear", "encoder"))
    assert linear["interval"]["value"] == pytest.approx(by_hand["linear"] - first["linear"])
    assert "data:image/svg+xml" in (tmp_path / "c.html").read_text()
    (other / "benchmark" / "right.safetensors").write_bytes(b"damaged")
    assert main(words) == 2
    assert "right.safetensors" in capsys.readouterr().err
    with pytest.raises(ValueError, match="twice"):
        read_candidates([run, run])
    kept = (other / "benchmark" / "results.json").read_bytes()
    (other / "benchmark" / "results.json").write_text("{")
    assert _missing(other, "quick") == "its results cannot be read"
    (other / "benchmark" / "results.json").write_bytes(kept)
    # Results are of the weights that were measured, and of the suite.
    assert _missing(other, "quick") is None
    assert _missing(other, "full") == "its results are of the quick suite"
    assert pretrain([f"run.dir={other}", "run.steps=4"]) == 0
    assert _missing(other, "quick") == "its results are of other weights"


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("  k: 20", "  k: 10", "k=20, not 10"),
        ("  eval_samples: 10000", "  eval_samples: 30", "eval.eval_samples=10000, not 30"),
        ("  precision: fp32\n  at_end", "  precision: bf16\n  at_end", "eval.precision=fp32, not bf16"),
        ("/eval-*.tar", "/other-*.tar", "/other-*.tar)"),
        ("  every_steps: null", "  every_steps: 3", None),
    ],
)
def test_results_of_other_settings_are_measured_again(measured, tmp_path, before, after, told):
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    config = (folder / "config.yaml").read_text()
    assert before in config
    (folder / "config.yaml").write_text(config.replace(before, after))
    why = _missing(folder, "quick")
    if told is None:
        assert why is None
        return
    assert why.startswith("its results are of other settings (")
    assert told in why
    # What an option of the suite named is as it was asked for.
    results = json.loads((folder / "benchmark" / "results.json").read_text())
    results["about"]["given"] = "data.eval k eval.precision eval.eval_samples"
    (folder / "benchmark" / "results.json").write_text(json.dumps(results))
    assert _missing(folder, "quick") is None


def test_what_options_name_is_kept_beside_the_results():
    assert Measured(held_out="x", train_samples=3).given() == ["data.eval", "eval.train_samples"]
    assert Measured().given() == []


def test_a_comparison_says_what_it_was_measured_on(tmp_path, capsys):
    runs = [candidate(name, [True, False]) for name in "abc"]
    runs[1].results = replace(runs[1].results, data="e")
    show(runs, groups={}, page_file=None, output=tmp_path / "j")
    assert "Measured on d (a, c); e (b)." in capsys.readouterr().out
    assert [one["data"] for one in json.loads((tmp_path / "j").read_text())["runs"]] == ["d", "e", "d"]


@pytest.mark.slow
def test_what_is_wrong_with_the_last_run_is_told_before_the_first_is_measured(run, train, monkeypatch):
    blind = train("blind", "recipe=ijepa", "data.eval=null")
    monkeypatch.setattr(comparing, "_missing", lambda folder, suite: "no results yet")
    monkeypatch.setattr(comparing, "run_suite", lambda *given, **settings: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"blind: the run has no data\.eval"):
        comparing.measure_missing([run, blind], "quick")


def test_combinations_are_hydras():
    found = list(combinations(["a=1,2", "hydra.sweep.dir=x", "b=[1,2]", "c=range(0,2)"]))
    assert found == [[f"a={a}", "b=[1,2]", f"c={c}"] for a in (1, 2) for c in (0, 1)]
    with pytest.raises(ValueError, match="key=a,b"):
        list(combinations(["nonsense"]))


@pytest.mark.slow
def test_sweep_trains_measures_and_groups(shards, tiny, tmp_path, capsys):
    words = [f"data.train={shards}/train-*.tar", f"data.eval={shards}/eval-*.tar", "run.steps=1", *tiny]
    words += ["recipe=hjepa", "hjepa.pyramid.levels=1", "hjepa.level_weights.weights=[1.0]"]
    folder = tmp_path / "swept (1)"
    command = ["sweep", "run.seed=0,1", f"hydra.sweep.dir={folder}", *words, "eval.every_steps=null"]
    assert main([*command, "--json", str(tmp_path / "s.json")]) == 0
    printed = capsys.readouterr().out
    assert "Over seeds" in printed
    assert "| all | 2 | encoder |" in printed
    found = json.loads((tmp_path / "s.json").read_text())
    assert len(found["runs"]) == 2
    assert set(found["settings"]) == {"run.seed"}
    # Of a smaller sweep into the same folder the runs are its own.
    command[1] = "run.seed=1"
    assert main([*command, "--json", str(tmp_path / "s.json")]) == 2
    assert "run.seed=1: the run in" in capsys.readouterr().err
    command[1] = "run.seed=0"
    assert main([*command, "--json", str(tmp_path / "s.json")]) == 0
    assert len(json.loads((tmp_path / "s.json").read_text())["runs"]) == 1


@pytest.mark.parametrize(("ended", "code"), [(1, 2), (2, 2), (3, 3)])
def test_a_sweep_of_which_a_run_diverged_ends_as_that_run(tmp_path, monkeypatch, capsys, ended, code):
    monkeypatch.setattr(sweeping, "multirun", lambda words: ended)
    assert main(["sweep", "run.seed=0,1", f"hydra.sweep.dir={tmp_path}"]) == code
    assert f"a run below {tmp_path} ended with exit code {ended}" in capsys.readouterr().err


def test_jobs_of_slurm_leave_runs_of_an_earlier_sweep_alone(tmp_path, monkeypatch):
    """They end in processes of their own, so that only their numbers tell them apart."""
    compared = []
    for name, result in {"multirun": 0, "ended_runs": [], "read_candidates": [], "show": None}.items():
        monkeypatch.setattr(sweeping, name, lambda *_, result=result, **__: result)
    monkeypatch.setattr(sweeping, "measure_missing", lambda folders, _: compared.extend(folders))
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        for name in ("config.yaml", "results.json"):
            (tmp_path / str(number) / name).touch()
    words = ["run.seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    sweeping.sweep(words, page=None, output=None)
    assert compared == [tmp_path / str(number) for number in range(2)]
    (tmp_path / "1" / "results.json").unlink()
    with pytest.raises(ValueError, match="1 of 2 runs have not ended"):
        sweeping.sweep(words, page=None, output=None)


def test_runs_of_one_name_in_folders_of_one_name_are_told_apart(measured, tmp_path):
    folders = [tmp_path / place / "runs" / "a" for place in ("here", "there")]
    for folder in folders:
        shutil.copytree(measured, folder)
    assert [one.name for one in read_candidates(folders)] == [str(folder.resolve()) for folder in folders]


def test_names_of_runs_are_shown_as_they_are(monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "vectors", lambda figure, _: drawn.append(figure) or "")
    names = ["_hidden", "a$b_1$"]
    one = Measurement(metric="error/fog/1", name=NAME, value=0.5, n=9)
    charts.lines({"fog": {name: [(1, one)] for name in names}}, "", "")
    charts.bars(["x"], {name: [one] for name in names}, "", "")
    charts.progress({name: [(0, 1)] for name in names}, "", "")
    for figure in drawn:
        figure.canvas.draw()
        legend = (figure.legends or [figure.axes[0].get_legend()])[0]
        shown = [text.get_text() for text in legend.get_texts()]
        assert [text.strip().replace("\\$", "$") for text in shown] == names
        plt.close(figure)


def test_names_of_classes_are_no_mathematics():
    names = ["from_$5_to_$10", "b"]
    assert "<img" in charts.matrix(np.eye(2), names, names, "")


def test_json_has_no_number_that_is_none_and_a_page_leaves_its_neighbours_alone(tmp_path, capsys):
    run = candidate("a", [True, False])
    details = {"corruptions": 5, "severities": 3, "undefined": "for a reason"}
    run.results.measurements.append(Measurement(metric="mce", name=NAME, value=math.nan, n=2, details=details))
    attentive = Measurement(metric="attentive_1", name=NAME, value=0.5, n=2, n_train=7)
    run.results.measurements.append(attentive)
    (tmp_path / "page.tmp").write_text("mine")
    show([run, candidate("b", [True, True])], groups={}, page_file=tmp_path / "page.html", output=tmp_path / "j")
    assert "NaN" not in (tmp_path / "j").read_text()
    assert (tmp_path / "page.tmp").read_text() == "mine"
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Results</h2>" in page
    # The attentive probe learns from fewer images than the linear one beside it.
    for shown in (page, capsys.readouterr().out):
        assert "attentive of 7 training images" in shown
        assert "over those of the untrained encoder, 2 images" in shown
