"""Collapse is noticed."""


def test_an_absurd_learning_rate_raises_the_alarm(pretrain, tiny, tmp_path, read_rows):
    words = (
        "recipe=hjepa",
        "trainer.learning_rate.value=10",
        "trainer.learning_rate.warmup_steps=0",
        "run.steps=60",
        "monitor.every=10",
    )
    done = pretrain(f"run.dir={tmp_path}/run", *tiny, *words)
    assert "collaps" in (done.out + done.err).lower()
    assert any(row.get("monitor/alarm") for row in read_rows(tmp_path / "run"))


def test_a_run_that_should_stop_at_a_collapse_ends_with_code_3(pretrain, tiny, tmp_path, capsys, read_losses):
    words = ("recipe=hjepa", "trainer.learning_rate.value=10", "trainer.learning_rate.warmup_steps=0", "run.steps=60")
    stop = ("monitor.every=5", "monitor.policy=stop")
    done = pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, *words, *stop)
    assert done.code == 3, done.err
    assert "collapse at level" in done.message
    assert read_losses(tmp_path / "run")[-1][0] < 60


def test_a_healthy_run_raises_none(pretrain, tiny, tmp_path, read_rows):
    done = pretrain(f"run.dir={tmp_path}/run", *tiny, "run.steps=60", "monitor.every=10")
    assert done.code == 0, done.err
    assert not any(row.get("monitor/alarm") for row in read_rows(tmp_path / "run"))
