"""Two processes do what one does."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

# A bias in front of a batch norm has no gradient but rounding, which Adam would blow up to a full step: hence the eps.
COMMON = ("run.steps=5", "trainer.precision=fp32", "data.batch_size=16", "trainer.optimizer.eps=1e-3")


@pytest.mark.distributed
@pytest.mark.parametrize(("recipe", "parallel"), [("hjepa", "fsdp"), ("hjepa_global", "ddp")])
def test_two_ranks_train_like_one(pretrain, tiny, tmp_path, read_losses, read_rows, recipe, parallel):
    words = (*tiny, *COMMON, f"recipe={recipe}", "eval.every_steps=3", "hjepa.predict_every=1")
    one = pretrain(f"run.dir={tmp_path}/one", *words)
    two = pretrain(f"run.dir={tmp_path}/two", *words, f"parallel={parallel}", ranks=2)
    assert one.code == 0, one.err
    assert two.code == 0, two.err
    # Only the first rank speaks.
    assert two.out.count("run folder:") == two.out.count("report:") == 1
    assert (
        two.err.count("checkpoint of step 5: training stalled") == two.err.count("1 checkpoint: training stalled") == 1
    )
    alone, together = (dict(read_losses(tmp_path / name)) for name in ("one", "two"))
    assert alone.keys() == together.keys() == set(range(1, 6))
    for step, loss in alone.items():
        assert together[step] == pytest.approx(loss, rel=2e-5), step
    measured, again = ([row for row in read_rows(tmp_path / name) if "eval/0/knn_20" in row] for name in ("one", "two"))
    assert [row["step"] for row in measured] == [row["step"] for row in again] == [1, 3, 5]
    for row, other in zip(measured, again, strict=True):
        for name in (name for name in row if name.startswith("eval/")):
            # Rounding may change what is nearest for one of the 120 images.
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1.5 / 120), (row["step"], name)
    weights, shared = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert weights.keys() == shared.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            shared[name], weight, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.distributed
def test_a_run_of_two_ranks_goes_on_alone(pretrain, tiny, workers_of, tmp_path, read_losses):
    words = (*tiny, "trainer.precision=fp32", "run.steps=30", "eval.at_end=false")
    whole = pretrain(f"run.dir={tmp_path}/whole", *words)
    assert whole.code == 0, whole.err
    half = pretrain.disturb(
        lambda process: os.kill(workers_of(process)[-1], signal.SIGTERM),
        tmp_path / "half", 3, *words, "parallel=ddp", ranks=2,
    )  # fmt: skip
    # torchrun has its own exit code, 1, and prints those of the ranks.
    assert half.code == 1
    assert "exitcode  : 75" in half.err, half.err
    reached = read_losses(tmp_path / "half")[-1][0]
    assert reached < 30
    rest = pretrain(f"run.dir={tmp_path}/half", "parallel=single")
    assert rest.code == 0, rest.err
    assert f"resumed at step {reached} of 30" in rest.err
    alone, together = (dict(read_losses(tmp_path / name)) for name in ("whole", "half"))
    assert alone.keys() == together.keys() == set(range(1, 31))
    for step, loss in alone.items():
        assert together[step] == pytest.approx(loss, rel=5e-5), step
