"""Words of the command line at their edges: taken as they are meant, or refused in one line and before all work."""

import errno
import logging
import os
import re
import shlex

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from hjepa_pretrain import multirun, settings
from hjepa_pretrain.model import command
from hjepa_pretrain.plan import schedules


@pytest.mark.parametrize("words", [["data.train=null"], ["plan.dry=false"]])
def test_a_word_that_names_no_data_leaves_the_demo(words):
    config, _ = settings.load(words)
    assert (config.preset, config.run.steps) == ("demo", 1450)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run.dir="], "run.dir=''"),
        (["data.eval="], "data.eval=''"),
        (["data.train="], "data.train=''"),
        (["run.seed=99999999999999999999"], "run.seed=99999999999999999999"),
        (["run.dir=r\udcfcn"], "no text in the encoding of file names"),
        (["run.threads=100000"], "run.threads=100000: too few or too many; allowed: 1 to 1024"),
        (["run.time_limit=1h30"], "run.time_limit=1h30"),
        (["run.time_limit=0"], "run.time_limit=0"),
        (["run.train_time=1h30"], "run.train_time=1h30: no length of time"),
        (["run.train_time=0"], "run.train_time=0: no time at all"),
        (["run={train_time: 5m, steps: 9}"], "run.train_time=5m: measures how many steps there are, and run.steps=9"),
        (["data.image_size=[0,0]"], "data.image_size=(0, 0)"),
        (["data.image_size=32"], "tuple; allowed: a list in brackets, as in [1,2]"),
        (["trainer.learning_rate=1e-4"], "allowed: one of the fields of this part, as in PART.FIELD=VALUE"),
        (["data.std=[nan,1,1]"], "std=(nan, 1.0, 1.0)"),
        (["data.crop_scale=[1,0.3]"], "scale=(1.0, 0.3)"),
        (["data.flip=nan"], "flip=nan"),
        (["data.window_shards=0"], "window_shards=0"),
        (["data.local_views=2", "data.local_size=[7,7]"], "data.local_size=(7, 7)"),
        (["trainer.learning_rate.horizon=0.1"], "learning_rate.horizon=0.1"),
        (
            ["recipe=ijepa", "trainer.ema_momentum.kind=constant", "trainer.ema_momentum.horizon=0.1"],
            "trainer.ema_momentum.final=1.0: kind=constant stays at horizon=0.1; give final=null",
        ),
        (["trainer.optimizer.betas=[0.9]"], "two numbers"),
        (["run={stepps: 9}"], "run.stepps is no setting; did you mean run.steps?"),
        (["hjepa={encoder: {dept: 3}}"], "hjepa.encoder.dept is no setting; did you mean hjepa.encoder.depth?"),
        (["hjepa.predictor.mlp_ratio=inf"], "hjepa.predictor.mlp_ratio=inf"),
        (["eval.train_samples=1", "eval.k=1"], "eval.train_samples=1"),
        (["eval.k=2000"], "eval.k=2000: more neighbours than eval.online_samples=1500"),
        (["recipe=simclr", "data.views=1"], "data.views=1"),
        (["recipe="], "allowed: hjepa, "),
        (["data.train=x", "early_stop={metric: eval/encoder/knn_20}"], "early_stop.metric=eval/encoder/knn_20"),
        (["eval.every_steps=null", "early_stop={metric: eval/0/rankme}"], "early_stop.metric=eval/0/rankme"),
        (["masks=null"], "by name"),
        (["recipe=[ijepa,hjepa]"], "recipe=[ijepa,hjepa]: one is chosen"),
        (["masks=[block,random]"], "masks=[block,random]: one is chosen"),
        (["early_stop={metric:", "x}"], "quote what holds spaces"),
        (["hydra/launcher=submitit_slurm"], "--multirun"),
        (["plan.find_lr_high=inf"], "find_lr_high=inf"),
        (["plan.dry=true", "plan.world_size=4", "parallel=single"], "plan.world_size=4"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_word_at_its_edge_is_refused(words, expected):
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(words)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["trainer.compile_mode=reduce_overhead", "trainer.compile_backend=aot_eager"],
            "without trainer.compile=true nothing reads trainer.compile_backend, trainer.compile_mode",
        ),
        (["trainer.ema_momentum.horizon=0.1"], "without hjepa.targets=ema or pooled nothing reads"),
        (["profiler.active=4"], "without profile=true nothing reads profiler.active"),
        (["recipe=ijepa", "data.local_views=6"], "without hjepa.global_level nothing reads data.local_views"),
        (["recipe=mae", "data.views=3"], "without hjepa.global_level or prediction=view nothing reads data.views"),
        (["recipe=ijepa", "data.views=2", "hjepa.masked_views=2"], None),
        (["recipe=simclr", "data.views=3", "data.local_views=2", "data.local_size=[16,16]"], None),
        (["trainer.parallel.fsdp.shard_size=2"], "without parallel=fsdp nothing reads"),
        (["trainer.parallel.find_unused_parameters=true"], "without parallel=ddp nothing reads"),
        (
            ["trainer.optimizer.kind=lars", "trainer.optimizer.betas=[0.9,0.9]"],
            "without trainer.optimizer.kind=adamw, muon",
        ),
        (["trainer.optimizer.kind=lion", "trainer.optimizer.eps=1e-6"], "without trainer.optimizer.kind=adamw or muon"),
        (["trainer.optimizer.kind=lion", "trainer.optimizer.betas=[0.9,0.99]"], None),
        (["trainer.compile=true", "trainer.compile_mode=reduce_overhead"], None),
        (["recipe=ijepa", "trainer.ema_momentum.horizon=0.1", "trainer.optimizer.muon_scale=2"], None),
    ],
)
def test_a_word_that_nothing_reads_is_named(caplog, words, said):
    with caplog.at_level(logging.WARNING):
        settings.load(words)
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == (said is not None)
    assert all(one.startswith(said) for one in found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hjepa.pyramid.levels=3", "hjepa.level_weights.weights=[1,1,1]"], "level 2 has one token, whose loss is 0"),
        (["hjepa.pyramid.levels=3", "hjepa.level_weights.weights=[1,1,0]"], None),
        (["hjepa.pyramid.levels=2", "hjepa.level_weights.weights=[1,1]"], None),
        (["hjepa.pyramid.levels=3", "hjepa.level_weights.weights=[1,1,1]", "hjepa.contrast=batch"], None),
    ],
)
def test_a_level_of_one_token_that_has_no_other_to_be_told_from_is_named(caplog, words, said):
    with caplog.at_level(logging.WARNING):
        settings.load(["recipe=hjepa_contrast", "model=vit_nano_patch8", *words])
    found = [record.getMessage() for record in caplog.records]
    assert [said in one for one in found if said] == [True] * (said is not None)
    assert len(found) == (said is not None)


@given(st.text(st.characters(exclude_categories=["C"], exclude_characters="$"), min_size=1))
@example("a\\")
@example("it\\'s 'a' b\\\\")
def test_any_path_comes_through(text):
    path = f"x{text}y\\"
    (override,) = OverridesParser.create().parse_overrides([settings.quoted(f"run.dir={path}")])
    assert override.value() == path


@pytest.mark.parametrize("recipe", ["hjepa", "simclr"])
def test_measured_steps_are_as_good_as_given_ones(recipe):
    words = [f"recipe={recipe}", "hjepa.level_weights.kind=curriculum"]
    _, measured = settings.load([*words, "run.train_time=80s"], steps=77)
    _, given = settings.load([*words, "run.steps=77"])
    measured.run.train_time = None
    assert measured == given


def test_a_stored_run_takes_a_part_that_was_off(tmp_path):
    _, plain = settings.load([f"run.dir={tmp_path}"])
    settings.save(plain, [], tmp_path)
    config, _ = settings.load([f"run.dir={tmp_path}", "early_stop={metric: eval/encoder/knn_20, patience: 2}"])
    assert config.early_stop.patience == 2


def test_images_of_a_stored_run_may_lie_elsewhere(tmp_path):
    _, plain = settings.load([f"run.dir={tmp_path}"])
    settings.save(plain, [], tmp_path)
    config, _ = settings.load([f"run.dir={tmp_path}", "data.cache=/new", "data.train=/new/train-*.tar"])
    assert (config.data.cache, config.data.train) == ("/new", "/new/train-*.tar")


def test_a_dry_run_of_a_stored_run_is_of_its_model(tmp_path):
    _, plain = settings.load([f"run.dir={tmp_path}"])
    settings.save(plain, [], tmp_path)
    config, _ = settings.load([f"run.dir={tmp_path}", "plan.dry=true"])
    assert (config.model, config.plan.models) == ("vit_nano_patch8", ())


def test_ranks_that_cannot_share_a_batch_hear_of_it_by_its_name():
    config, _ = settings.load(["data.batch_size=16"])
    with pytest.raises(
        ValueError, match=r"data\.batch_size=16: 3 processes with trainer\.accumulate=2 .*multiples of 6"
    ):
        config.data.stream(2, 3)


def test_a_dry_run_says_once_what_nothing_reads(caplog):
    with caplog.at_level(logging.INFO):
        settings.load(["profiler.active=4", "run.steps=10"], quiet=True)
    assert not caplog.records


def test_a_dry_run_of_several_ranks_is_spread():
    config, _ = settings.load(["plan.dry=true", "plan.world_size=256"])
    assert config.trainer.parallel.kind == "ddp"


@pytest.mark.parametrize(("recipe", "there"), [("ijepa", True), ("hjepa", True), ("hjepa_global", False)])
def test_a_moving_average_is_planned_wherever_there_is_one(recipe, there):
    config, _ = settings.load([f"recipe={recipe}"])
    assert ("EMA momentum" in schedules(config, np.arange(3))) is there


@pytest.mark.parametrize("word", ["run.dir=runs/one", "--cfg"])
def test_several_runs_refuse_what_only_one_could_have(capsys, word):
    assert multirun.multirun([word, "run.seed=0,1"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert word in said


def test_the_command_that_goes_on_can_be_pasted(tmp_path):
    folder = tmp_path / "a b's"
    assert shlex.split(command(folder)) == ["hjepa-pretrain", f"run.dir={folder}"]


@pytest.mark.parametrize("words", [["run.steps=0"], ["run.steps=10", "eval.k=0", "trainer.compile_mode=max_autotune"]])
def test_what_is_refused_says_nothing_else(words, caplog):
    caplog.set_level("INFO")
    with pytest.raises(settings.SettingsError):
        settings.load(words)
    assert not caplog.records
    settings.load(["run.steps=10"])
    assert "shortened to 2" in caplog.text


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (["early_stop.metric=a", "hjepa.global_level.weight=2", "early_stop.patience=2"],
         "'early_stop={metric: a, patience: 2}'"),
        (["recipe=ijepa", "hjepa.global_level.weight=2"], "'hjepa.global_level={weight: 2}'"),
    ],
)  # fmt: skip
def test_a_field_of_a_part_that_is_off_is_named_with_what_switches_it_on(words, whole):
    with pytest.raises(settings.SettingsError, match=r"is null here") as caught:
        settings.load(words)
    assert str(caught.value).endswith(whole)


def test_a_stored_run_names_a_field_of_a_part_that_is_off(tmp_path):
    settings.save(settings.load([])[1], [], tmp_path)
    with pytest.raises(settings.SettingsError, match=r"early_stop\.patience=2: early_stop is null here"):
        settings.load([f"run.dir={tmp_path}", "early_stop.patience=2"])


def test_a_part_is_given_whole_and_by_its_fields():
    words = ["early_stop.patience=7", "early_stop={metric: eval/encoder/knn_20}"]
    early_stop = settings.load(words)[0].early_stop
    assert early_stop is not None
    assert (early_stop.metric, early_stop.patience) == ("eval/encoder/knn_20", 7)


def test_a_default_that_is_refused_has_its_full_name():
    with pytest.raises(settings.SettingsError, match=r"^trainer\.optimizer\.kind=muon: needs whole matrices"):
        settings.load(["parallel=fsdp"])


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("run.steps=1e3", "a whole number in digits, as in 1000"),
        ("trainer.learning_rate.value=fast", "a number, as in 0.001 or 1e-3"),
        ("trainer.compile=maybe", "true or false"),
        ("run.seed=null", "give a value, or leave it out for the default"),
    ],
)
def test_a_value_of_another_type_is_told_what_is_allowed(word, allowed):
    with pytest.raises(settings.SettingsError, match=rf"^{re.escape(word.partition('=')[0])}: .*{allowed}$"):
        settings.load([word])


def test_a_configuration_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    plain = settings.load(["run.steps=7"])[1]
    settings.save(plain, [], tmp_path)
    before = (tmp_path / "config.yaml").read_text()

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        settings.save(plain, [{"command": "again"}], tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before
