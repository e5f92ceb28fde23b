"""A run leaves a folder that explains itself."""

import json
import re

import pytest
import torch
import yaml

from hjepa_eval import read_results
from hjepa_eval.results.__main__ import main as merge
from hjepa_models import load_pretrained

TRACED = ("profile=true", "profiler.wait=1", "profiler.warmup=1", "profiler.active=2")


@pytest.fixture(scope="module")
def run_dir(pretrain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = pretrain(f"run.dir={folder}", *pretrain.data, *pretrain.tiny, "eval.every_steps=6", *TRACED)
    assert done.code == 0, done.err
    (folder / "stdout").write_text(done.out)
    return folder


def test_everything_is_there(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model.safetensors", "config.json", "report.html"} <= names
    assert any(name.startswith("events.") for name in names)
    assert (run_dir / "results.json").is_file()
    shared = {(run_dir / name).stat().st_mode for name in ("model.safetensors", "config.json", "results.json")}
    assert len(shared) == 1


def test_rows_have_the_promised_names(run_dir, read_rows):
    rows = [row for row in read_rows(run_dir) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert {"train/loss", "train/images_per_second"} <= row.keys()
    last = rows[-1]
    assert {"train/loss_level_0", "train/loss_level_1", "train/loss_level_global"} <= last.keys()
    assert any("eval/encoder/knn_20" in row for row in read_rows(run_dir))
    assert any(re.fullmatch(r"monitor/.*rankme", key) for row in read_rows(run_dir) for key in row)


def test_the_configuration_says_where_it_comes_from(run_dir):
    stored = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert stored["recipe"] == "hjepa_global"
    (sitting,) = stored["provenance"]
    assert {"command", "versions", "git", "python"} <= sitting.keys()
    assert sitting["versions"]["torch"]


def test_weights_load_elsewhere(run_dir):
    model = load_pretrained(run_dir)
    images = torch.zeros(2, 3, 32, 32)
    assert model.features(images, level="encoder", pool="mean").shape == (2, 32)
    assert model.features(images, level=1, pool="none").shape == (2, 4, 32)


def test_results_name_level_branch_and_pooling(run_dir):
    results = read_results(run_dir / "results.json")
    # The recipe keeps no moving average.
    assert {one.name.branch for one in results.measurements} == {"online", "untrained online", "-"}
    trained = {one.name.level for one in results.measurements if one.name.branch == "online"}
    assert trained == {"encoder", "0", "1", "pooled", "all", "global"}
    for one in results.measurements:
        poolings = {"pixels": "flatten", "pooled": "none", "all": "none", "global": "none"}
        assert one.name.pooling == poolings.get(one.name.level, "mean")
        assert one.low <= one.value <= one.high
        accuracy = one.metric in ("knn_20", "white_knn_20", "linear")
        assert (one.method, one.n, one.n_train) == (("bootstrap", 120, 300) if accuracy else ("jackknife", 300, None))
        assert 0 <= one.value <= 1 if accuracy else one.value > 0
    assert {one.metric for one in results.measurements} == {
        "knn_20", "white_knn_20", "linear", "rankme", "effective_rank", "spread"
    }  # fmt: skip


def test_results_of_runs_merge(run_dir, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text((run_dir / "results.json").read_text().replace('"model": "run"', '"model": "other"'))
    assert merge([str(run_dir / "results.json"), str(other), "--markdown"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith(
        "| model | data | branch | level | pooling | knn_20 (n 300/120) | white_knn_20 (n 300/120) |"
    )
    assert len(rows) == 26
    assert rows[0].startswith("| run | ")
    assert "| online | encoder | mean | 0." in rows[0]
    assert rows[0].count("[") == 6


def test_the_page_shows_pictures_and_opens_offline(run_dir):
    page = (run_dir / "report.html").read_text()
    for heading in ("What was learned", "Loss", "RankMe", "Views", "Features", "Nearest neighbours"):
        assert f">{heading}" in page
    assert page.count("data:image/png;base64,") == 3
    assert page.count("data:image/svg+xml;base64,") >= 5
    assert "http://" not in page
    assert "https://" not in page


def test_the_terminal_shows_the_table(run_dir):
    printed = (run_dir / "stdout").read_text()
    for word in ("trained", "untrained", "pixels", "kNN", "linear", "RankMe", "images/s"):
        assert word in printed
    assert len(re.findall(r"0\.\d{3}±\.\d{3}  0\.\d{3}±\.\d{3} ", printed)) == 13


def test_the_trace_is_one_that_viewers_read(run_dir):
    (trace,) = (run_dir / "profile").glob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name", "").startswith("ProfilerStep") for event in events)
    assert any("addmm" in event.get("name", "") for event in events)


def test_the_seed_is_that_of_dropped_paths_too(pretrain, tiny, tmp_path, capsys, read_losses):
    words = ("recipe=hjepa", "hjepa.encoder.drop_path=0.5", "eval.at_end=false", "run.steps=3")
    for name in "ab":
        assert pretrain.here(capsys, f"run.dir={tmp_path}/{name}", *tiny, *words).code == 0
    assert read_losses(tmp_path / "a") == read_losses(tmp_path / "b")


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_go_back_to_their_folder(
    pretrain, tiny, tmp_path, capsys, monkeypatch, read_losses
):
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "RANK": "0", "WORLD_SIZE": "1"}
    monkeypatch.chdir(tmp_path)
    for life, steps in enumerate((1, 3)):
        environment = {**place, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(life)}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("hjepa_pretrain.run.time.time", lambda life=life: 1.8e9 + 60 * life)
        words = ("recipe=hjepa", "eval.at_end=false", f"run.steps={steps}")
        done = pretrain.here(capsys, *tiny, *words)
        assert done.code == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert [step for step, _ in read_losses(folder)] == [1, 2, 3]
