import math
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from hjepa_train import (
    Callback,
    ParallelConfig,
    RateSweep,
    ScheduleConfig,
    StepOutput,
    TrainerConfig,
    find_rate,
)
from hjepa_train.lr_finder import SweepStoppedError
from hjepa_train.testing import ArithmeticStream, ToyModule


class Bowl(nn.Module):
    """A quadratic of curvature 1 in every direction, with gradient descent by AdamW's sign of about one rate a step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 4), 3.0))

    def forward(self, batch, step):
        return StepOutput(loss=self.weight.square().mean())


def config(device):
    return TrainerConfig(steps=7, precision="fp32", clip_norm=None, parallel=ParallelConfig(device=device.type))


def test_the_sweep_rises_by_equal_factors_and_ends_where_the_loss_has_gone(device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = find_rate(Bowl(), ArithmeticStream(), config(device), low=1e-4, high=1e4, steps=60)
    assert len(sweep.rates) < 60
    factors = sweep.rates[1:] / sweep.rates[:-1]
    assert factors == pytest.approx(np.full(len(factors), (1e4 / 1e-4) ** (1 / 59)), rel=1e-6)
    assert sweep.losses[0] == 9.0
    assert 1e-3 < sweep.suggestion < 3.0
    assert not list(tmp_path.iterdir()), "something was saved"


def test_weight_decay_and_momentum_are_those_of_the_runs_first_step(device):
    class Rates(Callback):
        def __init__(self):
            self.seen = set()

        def on_step_end(self, trainer, result):
            self.seen.add((result.rates["weight_decay"], result.rates["ema_momentum"]))

    run = TrainerConfig(
        steps=36_000,
        precision="fp32",
        weight_decay=ScheduleConfig(kind="cosine", value=0.04, final=0.4, warmup_steps=3, unit="epochs"),
        ema_momentum=ScheduleConfig(kind="linear", horizon=1 / 36, final=1.0),
        samples_per_step=4,
        samples_per_epoch=4,
        parallel=ParallelConfig(device=device.type),
    )
    rates = Rates()
    find_rate(ToyModule(), ArithmeticStream(), run, low=1e-5, high=1e-4, steps=10, callbacks=[rates])
    # A warm-up of three steps is a quarter on its way, and an average over 1,000 steps has a momentum of 0.999.
    assert sorted(rates.seen) == [(pytest.approx(0.01), pytest.approx(0.999))]


class Late(Bowl):
    """Another term has come in at step 20, and is part of every third step from step 2 on."""

    cycle = 3

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batch, step):
        self.seen.append(step)
        more = (100.0 if step >= 20 else 0.0) * (step % 3 == 2)
        return StepOutput(loss=super().forward(batch, step).loss + more)


def test_a_loss_that_changes_by_design_is_swept_at_one_kind_of_step(device):
    module = Late()
    sweep = find_rate(module, ArithmeticStream(), config(device), low=1e-6, high=1e-2, steps=60, place=29)
    assert module.seen == list(range(29, 29 + 3 * 60, 3))
    assert len(sweep.rates) == 60
    assert sweep.rates[-1] == pytest.approx(1e-2)
    assert (sweep.losses >= 100.0).all()


def test_the_suggestion_is_the_steepest_fall():
    rates = np.geomspace(1e-5, 1.0, 100)
    fall = 1.0 / (1.0 + np.exp(6.0 * (np.log10(rates) + 2.0)))  # steepest at 1e-2; the average lags a little
    assert math.log10(RateSweep(rates=rates, losses=fall).suggestion) == pytest.approx(-2.0, abs=0.5)
    assert RateSweep(rates=rates, losses=np.linspace(1.0, 2.0, 100)).suggestion is None


def test_a_loss_that_is_not_finite_ends_the_sweep(device):
    class Broken(Bowl):
        def forward(self, batch, step):
            return StepOutput(loss=super().forward(batch, step).loss * (math.nan if step > 20 else 1.0))

    sweep = find_rate(Broken(), ArithmeticStream(), config(device), steps=40)
    assert len(sweep.losses) == 21
    assert np.isfinite(sweep.losses).all()


def test_a_sweep_without_a_finite_loss_suggests_nothing(device):
    class Broken(Bowl):
        def forward(self, batch, step):
            return StepOutput(loss=super().forward(batch, step).loss * math.nan)

    sweep = find_rate(Broken(), ArithmeticStream(), config(device), steps=10)
    assert len(sweep.losses) == 0
    assert sweep.suggestion is None


def test_a_sweep_that_is_stopped_suggests_nothing(device):
    class Stop(Callback):
        def on_step_end(self, trainer, result):
            if trainer.step == 12:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SweepStoppedError, match="stopped after step 12 of 40"):
        find_rate(Bowl(), ArithmeticStream(), config(device), steps=40, callbacks=[Stop()])


def test_no_sweep_is_refused(device):
    with pytest.raises(ValueError, match="allowed: 0 < low < high"):
        find_rate(Bowl(), ArithmeticStream(), config(device), high=math.inf)
    with pytest.raises(ValueError, match="allowed: 0 < low < high"):
        find_rate(Bowl(), ArithmeticStream(), config(device), low=1.0, high=0.1)
