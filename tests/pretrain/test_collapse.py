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


def test_a_healthy_run_raises_none(pretrain, tiny, tmp_path, read_rows):
    done = pretrain(f"run.dir={tmp_path}/run", *tiny, "run.steps=60", "monitor.every=10")
    assert done.code == 0, done.err
    assert not any(row.get("monitor/alarm") for row in read_rows(tmp_path / "run"))
