"""Every mistake a user can make gives one clear line and exit code 2, and loses nothing."""

import io
import json
import os
import shutil
import signal
import tarfile
import time

import pytest

from hjepa_pretrain import settings
from hjepa_pretrain.cli import main
from hjepa_train import TensorBoardLog

WRONG = 2


@pytest.fixture(scope="module")
def finished_run(pretrain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([f"run.dir={folder}", *pretrain.data, *pretrain.tiny, "run.steps=2", "eval.at_end=false"]) == 0
    return folder


def refuse(finished, *words):
    """The run ended with code 2 and one line that holds these words."""
    assert finished.code == WRONG, (finished.code, finished.err)
    assert "Traceback" not in finished.err
    assert len(finished.err.strip().splitlines()) == 1, finished.err
    for word in words:
        assert word in finished.message, finished.message


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [10.0])])
def test_the_first_process_of_a_machine_refuses_for_all_of_them(pretrain, capsys, monkeypatch, rank, waits):
    waited = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("hjepa_pretrain.cli.time.sleep", waited.append)
    refuse(pretrain.here(capsys, "run.stpes=5"), "run.stpes")
    assert waited == waits


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run.stpes=5"], ["run.stpes", "run.steps"]),
        (["run.steps=many"], ["run.steps", "many"]),
        (["recipe=ijpea"], ["recipe=ijpea", "ijepa", "hjepa_global"]),
        (["steps"], ["steps", "key=value"]),
        (["--run.steps=5"], ["'--run.steps=5'", "key=value"]),
        (["run.steps==5"], ["'run.steps==5'", "key=value"]),
        (["run.seed=0,1"], ["run.seed=0,1", "--multirun"]),
        (["lr=1"], ["lr is no setting", "--settings"]),
        (["trainer.learning_rate.value=nan"], ["trainer.learning_rate.value=nan"]),
        (["checkpoint.every_steps=0"], ["checkpoint.every_steps=0"]),
        (["color={brightness: -1}"], ["color.brightness=-1"]),
        (["model=vit_smal_patch16"], ["vit_smal_patch16", "vit_small_patch16"]),
        (["hjepa.encoder.embed_dims=5"], ["embed_dims", "embed_dim"]),
        (["data.image_size=[36,36]"], ["36", "multiples of 8"]),
        (["hjepa.pyramid.levels=7"], ["levels=7", "3"]),
        (["recipe=hjepa", "masks.context_ratio=0.95"], ["context"]),
        (["data.batch_size=0"], ["batch_size=0"]),
        (["data.local_views=2", "data.local_size=[32,32]"], ["local_size=(32, 32)", "as large as data.image_size"]),
        (["data.std=[0,1,1]"], ["std=(0.0, 1.0, 1.0)", "above 0"]),
        (["data.eval_crop_fraction=2"], ["data.eval_crop_fraction=2", "up to 1"]),
        (["data.decode=tpu"], ["data.decode=tpu", "cpu, gpu"]),
        (["data.decode=gpu", "data.cache_mib=1"], ["data.cache_mib=1", "data.decode=gpu"]),
        (["data.decode=gpu", "data.cache_mib=0", "run.device=cpu"], ["data.decode=gpu", "CUDA device"]),
        (["run.time_limit=soon"], ["soon"]),
        (["parallel=dpp"], ["dpp", "ddp"]),
        (["+foo=1"], ["+foo=1", "key=value"]),
        (["trainer.steps=5"], ["trainer.steps", "run.steps"]),
        (["trainer={steps: 5}"], ["trainer.steps", "run.steps"]),
        (["hjepa.patch_schedule={sizes: [8, 4], total_steps: 5}"], ["total_steps", "run.steps"]),
        (["recipe=hjepa", "hjepa.global_level.weight=2"], ["hjepa.global_level is null here"]),
        (["hjepa.predictor.state={groups: 4}"], ["groups", "num_groups"]),
        (["hjepa.predictor.state={num_classes: 1}"], ["num_classes=1", "2 and more"]),
        (["hjepa.patch_schedule={sizes: [8, 4]}"], ["patch_schedule", "output_patch_size"]),
        (["hjepa.patch_schedule.total_steps=5"], ["total_steps", "run.steps"]),
        (["recipe=hjepa", "hjepa.targets=online"], ["targets=online", "sigreg_weight"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_setting(pretrain, tiny, tmp_path, capsys, words, expected):
    run_dir = tmp_path / "run"
    refuse(pretrain.here(capsys, f"run.dir={run_dir}", *tiny, *words), *expected)
    assert not run_dir.exists()


def test_a_part_given_whole_is_given_field_by_field(tiny, tmp_path):
    words = [word for word in tiny if "warmup" not in word and not word.startswith("data.train")]
    data = next(word for word in tiny if word.startswith("data.train")).removeprefix("data.train=")
    config, _ = settings.load([*words, "trainer.learning_rate={warmup_steps: 9}", f"data={{train: '{data}'}}"])
    assert config.trainer.learning_rate.warmup_steps == 9
    assert config.preset == "none"


def test_a_tilde_is_the_home_folder(pretrain, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = ("run.dir=~/run", "run.steps=1", "eval.at_end=false")
    assert pretrain.here(capsys, *tiny, *words).code == 0
    assert (tmp_path / "home" / "run" / "config.yaml").is_file()
    assert pretrain.here(capsys, "run.dir=~/run").code == 0
    assert not (tmp_path / "~").exists()


def test_wrong_words_of_several_runs(pretrain, tmp_path, capsys):
    refuse(pretrain.here(capsys, "run.stpes=1,2", "--multirun"), "run.stpes", "run.steps")
    (tmp_path / "file").touch()
    folder = f"hydra.sweep.dir={tmp_path}/file/sweep (1)"
    refuse(pretrain.here(capsys, "run.seed=1,2", folder, "--multirun"), f"{tmp_path}/file/sweep (1)")


def test_no_such_shard(pretrain, tiny, tmp_path, capsys):
    refuse(
        pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, f"data.train={tmp_path}/missing-000.tar"),
        "missing-000.tar",
    )


def test_a_brace_pattern_with_a_missing_shard(pretrain, tiny, tmp_path, shards, capsys):
    pattern = f"data.train='{shards}/train-{{000000..000099}}.tar'"
    refuse(pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, pattern), "train-0000")


def test_a_glob_that_matches_nothing(pretrain, tiny, tmp_path, shards, capsys):
    refuse(
        pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, f"data.train={shards}/trian-*.tar"),
        "trian-*.tar",
        str(shards),
    )


def test_the_command_itself_exits_with_code_2(pretrain, tiny, tmp_path):
    refuse(pretrain(f"run.dir={tmp_path}/run", *tiny, "run.stpes=5"), "run.steps")


def test_a_truncated_tar(pretrain, tiny, tmp_path, shards, capsys):
    broken = tmp_path / "train-000000.tar"
    whole = next(shards.glob("train-*.tar")).read_bytes()
    broken.write_bytes(whole[: len(whole) // 2 + 100])
    words = [word for word in tiny if not word.startswith("masks.")]  # the default recipe says that it reads none
    done = pretrain.here(capsys, f"run.dir={tmp_path}/run", *words, f"data.train={broken}")
    refuse(done, "train-000000.tar", "truncated")


def test_undecodable_images_are_counted_and_the_run_goes_on(
    pretrain, tiny, tmp_path, shards, capsys, caplog, read_rows
):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in shards.glob("train-*.tar"):
        shutil.copy(shard, folder)
    with tarfile.open(folder / "train-000099.tar", "w") as tar:
        for number in range(20):
            content = b"this is no picture"
            member = tarfile.TarInfo(f"broken{number}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    run_dir = tmp_path / "run"
    # 320 samples in batches of 16: 20 steps see every sample.
    saving = ("checkpoint.every_steps=8", "trainer.log_every=20", "data.max_skipped_fraction=1")
    words = (f"run.dir={run_dir}", *tiny, f"data.train={folder}/train-*.tar", "run.steps=20", *saving)
    words = (*words, "eval.at_end=false")
    with caplog.at_level("INFO"):
        done = pretrain.here(capsys, *words)
    assert done.code == 0, done.err
    assert "20 undecodable" in done.out + caplog.text
    assert read_rows(run_dir)[-1]["data/skipped"] == 20
    # From a save between two rows of the metrics the count goes on, too.
    checkpoints = run_dir / "checkpoints"
    for later in checkpoints.glob("step_*"):
        if later.name not in ("step_00000008", "step_00000016"):
            shutil.rmtree(later)
    assert pretrain.here(capsys, *words).code == 0
    assert read_rows(run_dir)[-1]["data/skipped"] == 20


def test_a_checkpoint_of_another_model(pretrain, finished_run, tiny, tmp_path, capsys, read_losses):
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    before = read_losses(run_dir)
    words = ("hjepa.encoder.embed_dim=64", "run.steps=4")
    refuse(pretrain.here(capsys, f"run.dir={run_dir}", *words), "embed_dim", "run.dir")
    other = tmp_path / "other"
    words = ("hjepa.encoder.embed_dim=64", "run.steps=1", "eval.at_end=false")
    assert pretrain.here(capsys, f"run.dir={other}", *tiny, *words).code == 0
    shutil.rmtree(other / "checkpoints")
    shutil.copytree(run_dir / "checkpoints", other / "checkpoints")
    refuse(pretrain.here(capsys, f"run.dir={other}", "run.steps=4"), "another model")
    assert read_losses(run_dir) == before


@pytest.mark.parametrize(
    "change", ["data.crop_scale=[0.5,1.0]", "color=null", "hjepa.global_level=null", "run.seed=7", "recipe=hjepa"]
)
def test_a_change_that_makes_another_run_is_refused(pretrain, finished_run, capsys, change):
    before = (finished_run / "config.yaml").read_bytes()
    refuse(pretrain.here(capsys, f"run.dir={finished_run}", change), change.split("=")[0], "another run.dir")
    assert (finished_run / "config.yaml").read_bytes() == before


def test_a_run_that_a_logger_refuses_stays_as_it_was(pretrain, finished_run, tiny, tmp_path, capsys, monkeypatch):
    """As W&B without a key, and MLflow without a server, do once the run is to begin."""

    def refused(self, trainer):
        raise settings.SettingsError("loggers=tensorboard: no such server; leave it out")

    words = ("loggers=[jsonl,tensorboard]", "eval.at_end=false")
    before = (finished_run / "config.yaml").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardLog, "on_fit_start", refused)
        for more in ([f"run.dir={finished_run}", "run.steps=9"], [f"run.dir={tmp_path}/new", *tiny]):
            done = pretrain.here(capsys, *more, *words)
            assert (done.code, "no such server" in done.message) == (WRONG, True), done.err
        assert (finished_run / "config.yaml").read_bytes() == before
        assert not (tmp_path / "new" / "config.yaml").exists()
    # It can begin there once the logger is there.
    done = pretrain.here(capsys, f"run.dir={tmp_path}/new", *tiny, "run.steps=1", *words)
    assert done.code == 0, done.err


@pytest.fixture
def copied(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copied")


@pytest.mark.parametrize("content", [b"- 1\n", b"", b"\xff\xfe", b"masks: [\n", b"mask_law: [1]\n"])
def test_a_damaged_configuration(pretrain, copied, capsys, content):
    (copied / "config.yaml").write_bytes(content)
    refuse(pretrain.here(capsys, f"run.dir={copied}"), str(copied / "config.yaml"), "another run.dir")


@pytest.mark.parametrize("content", ["[1]", "{", '{"step": 2, "rows": [{}]}', '{"step": 2}'])
def test_damaged_results_are_written_again(pretrain, copied, finished_run, capsys, caplog, content):
    """The second but last is what an earlier version wrote."""
    (copied / "results.json").write_text(content)
    assert pretrain.here(capsys, f"run.dir={copied}").code == 0
    before, after = (json.loads((run / "results.json").read_text()) for run in (finished_run, copied))
    assert after == before | {"model": "copied"}
    (said,) = [one.getMessage() for one in caplog.records if "written again" in one.getMessage()]
    assert said.startswith(f"{copied / 'results.json'}: no results of hjepa-eval: ")
    assert "\n" not in said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "report.html"])
def test_what_a_finished_run_has_lost_is_written_again(pretrain, copied, capsys, name):
    before = (copied / name).read_bytes()
    (copied / name).unlink()
    assert pretrain.here(capsys, f"run.dir={copied}").code == 0
    assert name == "report.html" or (copied / name).read_bytes() == before
    assert (copied / name).is_file()


def test_damaged_metrics_are_named(pretrain, copied, capsys):
    (copied / "metrics.jsonl").write_text("{torn\n")
    (copied / "report.html").unlink()
    done = pretrain.here(capsys, f"run.dir={copied}", "loggers=[]")
    assert done.code == WRONG
    assert f"{copied / 'metrics.jsonl'}: damaged" in done.message


def test_a_finished_run_without_checkpoints_does_not_begin_again(pretrain, copied, capsys):
    before = {path: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    shutil.rmtree(copied / "checkpoints")
    refuse(pretrain.here(capsys, f"run.dir={copied}"), str(copied), "results.json")
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


@pytest.mark.slow
def test_two_programs_do_not_train_in_one_folder(pretrain, tiny, tmp_path, capsys, read_losses):
    run_dir = tmp_path / "run"
    # However long it goes on, it leaves no checkpoint of a step that the next one does not have.
    first = pretrain.start(f"run.dir={run_dir}", *tiny, "run.steps=1000000", "checkpoint.every_steps=null")
    try:
        deadline = time.monotonic() + 300
        while not losses_of(first, run_dir, read_losses):
            assert time.monotonic() < deadline
        before = (run_dir / "config.yaml").read_bytes()
        refuse(pretrain.here(capsys, f"run.dir={run_dir}", "run.steps=3"), str(run_dir), "another program trains there")
        assert (run_dir / "config.yaml").read_bytes() == before
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    # One that was killed keeps nobody out.
    assert pretrain.here(capsys, f"run.dir={run_dir}", "run.steps=3", "eval.at_end=false").code == 0


def losses_of(process, run_dir, read_losses):
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.05)
    return read_losses(run_dir)


def test_a_folder_that_is_no_run_is_left_alone(pretrain, tiny, tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    refuse(pretrain.here(capsys, f"run.dir={tmp_path}", *tiny), "config.json", "no run")
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(pretrain, tiny, tmp_path, capsys, read_losses):
    run_dir = tmp_path / "run"
    words = ("run.steps=2", "checkpoint.every_steps=1", "eval.at_end=false")
    assert pretrain.here(capsys, f"run.dir={run_dir}", *tiny, *words).code == 0
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())

    stopped = pretrain(f"run.dir={run_dir}", "run.steps=4", file_size=64 * 1024)
    assert stopped.code == WRONG, (stopped.code, stopped.err)
    assert "newest checkpoint that is whole" in stopped.message
    assert "Traceback" not in stopped.err
    assert set(saved) <= {path.name for path in (run_dir / "checkpoints").iterdir()}
    again = pretrain.here(capsys, f"run.dir={run_dir}", "run.steps=4")
    assert again.code == 0, again.err
    assert [step for step, _ in read_losses(run_dir)] == [1, 2, 3, 4]
