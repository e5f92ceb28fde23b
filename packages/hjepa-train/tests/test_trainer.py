import json
import math

import pytest
import torch
from torch import nn

from hjepa_train import (
    Callback,
    CheckpointConfig,
    CheckpointError,
    GuardConfig,
    MetricsLog,
    Outcome,
    ParallelConfig,
    ScheduleConfig,
    StepOutput,
    Trainer,
    TrainerConfig,
    TrainingError,
)
from hjepa_train.testing import ArithmeticStream, ToyModule


def config(device, **fields):
    settings = {"steps": 5, "precision": "fp32", "log_every": 1, "parallel": ParallelConfig(device=device.type)}
    return TrainerConfig(**(settings | fields))


class Rows(Callback):
    def __init__(self):
        self.rows = []

    def on_row(self, trainer, row):
        self.rows.append(dict(row))


def train(device, module=None, stream=None, **fields):
    rows = Rows()
    module = ToyModule() if module is None else module
    stream = ArithmeticStream() if stream is None else stream
    trainer = Trainer(module, stream, config(device, **fields), callbacks=[rows])
    assert trainer.fit() is Outcome.DONE
    return trainer, rows.rows


def test_the_loop_equals_the_same_steps_written_out(device):
    rate = ScheduleConfig(value=0.01)
    trainer, rows = train(device, learning_rate=rate, clip_norm=0.5, ema_momentum=ScheduleConfig(value=0.9))

    module = ToyModule().to(device)
    decay = [p for n, p in module.named_parameters() if p.requires_grad and p.ndim > 1 and n != "mask_token"]
    rest = [p for n, p in module.named_parameters() if p.requires_grad and (p.ndim == 1 or n == "mask_token")]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0}], lr=0.01
    )
    losses = []
    for step, batch in zip(range(5), ArithmeticStream(), strict=False):
        loss = module(batch.to(device), step).loss
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        assert rows[step]["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        optimizer.step()
        for online, target in zip(module.online.parameters(), module.target.parameters(), strict=True):
            target.data.mul_(0.9).add_(online.data, alpha=0.1)
        losses.append(float(loss.detach()))
    assert [row["train/loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    for name, value in trainer.module.state_dict().items():
        assert torch.allclose(value, module.state_dict()[name], atol=1e-6), name


def test_accumulation_averages_the_micro_batches(device):
    whole, rows = train(device, learning_rate=ScheduleConfig(value=0.01))
    halves, accumulated = train(
        device, stream=ArithmeticStream(batch_size=8), accumulate=2, learning_rate=ScheduleConfig(value=0.01)
    )
    assert [r["train/loss"] for r in accumulated] == pytest.approx([r["train/loss"] for r in rows], rel=1e-5)
    assert [r["train/samples"] for r in accumulated] == [r["train/samples"] for r in rows]
    for name, value in halves.module.state_dict().items():
        assert torch.allclose(value, whole.module.state_dict()[name], atol=1e-5), name


def test_rows_hold_the_step_and_its_rates(device):
    momentum = ScheduleConfig(kind="linear", value=0.5, final=1.0)
    _, rows = train(device, steps=4, ema_momentum=momentum, learning_rate=ScheduleConfig(value=0.25))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["train/ema_momentum"] for row in rows] == [0.5, 0.625, 0.75, 0.875]
    first = rows[0]
    assert first["train/lr"] == 0.25
    assert first["train/weight_decay"] == 0.05
    assert first["train/loss"] == first["train/loss_level_0"]
    assert first["train/samples"] == 16
    assert first["train/images_per_second"] > 0


def test_only_every_nth_step_is_logged_and_the_ends(device):
    _, rows = train(device, steps=11, log_every=4)
    assert [row["step"] for row in rows] == [1, 4, 8, 11]


def test_bf16_trains_with_float32_weights(device):
    trainer, rows = train(device, precision="bf16", steps=60, log_every=1, learning_rate=ScheduleConfig(value=0.01))
    losses = [row["train/loss"] for row in rows]
    assert losses[-1] < 0.8 * losses[0]
    assert all(value.dtype is torch.float32 for value in trainer.module.state_dict().values())


def test_a_parameter_without_gradient_waits(device):
    module = ToyModule(late_step=3)
    before = module.predictor.expand.weight.detach().clone()
    trainer, _ = train(device, module=module, steps=3)
    assert torch.equal(trainer.module.predictor.expand.weight.cpu(), before)
    trainer, _ = train(device, module=ToyModule(late_step=3), steps=4)
    assert not torch.equal(trainer.module.predictor.expand.weight.cpu(), before)


class Diverging(ToyModule):
    """Its loss becomes NaN at a step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, batch, step):
        output = super().forward(batch, step)
        return StepOutput(loss=output.loss * (math.nan if step == self.at else 1.0), metrics=output.metrics)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(device, tmp_path):
    cadence = CheckpointConfig(every_steps=1)
    strict = config(device, guard=GuardConfig(max_skips=0))
    trainer = Trainer(Diverging(3), ArithmeticStream(), strict, run_dir=tmp_path, checkpoint=cadence)
    with pytest.raises(TrainingError, match=r"step 4: the loss or its gradient is not finite") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    newest = trainer.store.newest()
    assert newest.state["step"] == 3
    assert all(bool(torch.isfinite(tensor).all()) for tensor in newest.tensors().values() if tensor.is_floating_point())


def test_a_gradient_that_is_not_finite_ends_the_run(device):
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, batch, step):
            return StepOutput(loss=self.weight.sqrt().sum())

    with pytest.raises(TrainingError, match=r"step 4: .* for 4 steps in a row"):
        Trainer(Steep(), ArithmeticStream(), config(device)).fit()


def test_a_stream_that_ends_is_one_line(device):
    with pytest.raises(TrainingError, match="step 3: the stream has ended before step 5"):
        Trainer(ToyModule(), ArithmeticStream(end=3), config(device)).fit()


def test_a_module_needs_no_ema(device):
    class Plain(nn.Linear):
        def forward(self, batch, step):
            return StepOutput(loss=super().forward(batch.values).square().mean())

    _, rows = train(device, module=Plain(8, 1))
    assert "train/ema_momentum" not in rows[0]


def test_callbacks_are_closed_whatever_happens(device):
    class Failing(Callback):
        outcomes = None

        def on_step_end(self, trainer, result):
            raise RuntimeError("broken")

        def on_fit_end(self, trainer, outcome):
            self.outcomes = [outcome]

    failing = Failing()
    with pytest.raises(RuntimeError, match="broken"):
        Trainer(ToyModule(), ArithmeticStream(), config(device), callbacks=[failing]).fit()
    assert failing.outcomes == [None]


@pytest.mark.parametrize("broken", [True, False], ids=["a run that failed", "a run that is done"])
def test_a_callback_that_cannot_end_hides_no_error_and_lets_the_others_end(device, caplog, broken):
    class Broken(Callback):
        def __init__(self, name):
            self.name = name

        def on_step_end(self, trainer, result):
            if broken:
                raise RuntimeError("the run broke")

        def on_fit_end(self, trainer, outcome):
            raise RuntimeError(f"{self.name} cannot end")

    class Last(Callback):
        ended = False

        def on_fit_end(self, trainer, outcome):
            self.ended = True

    last = Last()
    callbacks = [Broken("one"), Broken("two"), last]
    with pytest.raises(RuntimeError, match="the run broke" if broken else "one cannot end"):
        Trainer(ToyModule(), ArithmeticStream(), config(device), callbacks=callbacks).fit()
    assert last.ended
    for name in ("one", "two"):
        assert f"Broken: {name} cannot end" in caplog.text


def test_a_disk_that_is_full_at_the_end_leaves_a_run_done(device, caplog):
    class Full(Callback):
        def on_fit_end(self, trainer, outcome):
            raise OSError(28, "No space left on device")

    trainer = Trainer(ToyModule(), ArithmeticStream(), config(device), callbacks=[Full()])
    assert trainer.fit() is Outcome.DONE
    assert "Full: [Errno 28]" in caplog.text


@pytest.mark.parametrize(("epochs", "said"), [(1, False), (2, True)])
def test_a_warm_up_as_long_as_the_run_is_said(device, caplog, epochs, said):
    rate = ScheduleConfig(value=0.01, warmup_steps=epochs, unit="epochs")
    lengths = {"samples_per_step": 16, "samples_per_epoch": 48}
    Trainer(ToyModule(), ArithmeticStream(), config(device, learning_rate=rate, **lengths))
    assert ("lr: its warm-up takes 6 steps, the run 5" in caplog.text) is said


def test_a_finished_run_stays_finished(device, tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for _ in range(2):
        trainer = Trainer(ToyModule(), ArithmeticStream(), config(device), run_dir=tmp_path, callbacks=[log])
        assert trainer.fit() is Outcome.DONE
        assert trainer.step == 5
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_a_run_cannot_be_made_shorter_than_it_is(device, tmp_path):
    Trainer(ToyModule(), ArithmeticStream(), config(device), run_dir=tmp_path).fit()
    with pytest.raises(
        CheckpointError, match=r"steps=3: .*checkpoints has a checkpoint of step 5; allowed: 5 "
    ) as caught:
        Trainer(ToyModule(), ArithmeticStream(), config(device, steps=3), run_dir=tmp_path).fit()
    assert "\n" not in str(caught.value)


def test_callbacks_of_one_class_keep_their_own_states(device, tmp_path):
    class Named(Callback):
        def __init__(self, name):
            self.name, self.found = name, None

        def state_dict(self):
            return {"name": self.name}

        def load_state_dict(self, state):
            self.found = state["name"]

    for steps in (2, 3):
        named = [Named("a"), Named("b"), Named("c")]
        trainer = Trainer(
            ToyModule(), ArithmeticStream(), config(device, steps=steps), run_dir=tmp_path, callbacks=named
        )
        trainer.fit()
    assert [callback.found for callback in named] == ["a", "b", "c"]
    # As in checkpoints that knew one of a class.
    assert trainer.store.newest().state["callbacks"]["Named"] == {"name": "a"}


def test_a_buffer_that_no_checkpoint_can_hold_is_refused_before_the_first_step(device, tmp_path):
    module = ToyModule()
    module.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    trainer = Trainer(module, ArithmeticStream(), config(device), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"model/odd: complex128 cannot be saved; allowed: float64, ") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    assert trainer.step == 0


def test_a_run_can_be_made_longer(device, tmp_path):
    for steps in (3, 6):
        trainer = Trainer(ToyModule(), ArithmeticStream(), config(device, steps=steps), run_dir=tmp_path)
        assert trainer.fit() is Outcome.DONE
    assert (trainer.step, trainer.samples, trainer.stream.position) == (6, 96, 6)
