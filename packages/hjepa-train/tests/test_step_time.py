import os
import signal
import time

import pytest
import torch
from torch import nn

from hjepa_train import ParallelConfig, StepOutput, TrainerConfig, time_steps
from hjepa_train.testing import ArithmeticStream

BREAK = 0.3


@pytest.fixture
def clock(monkeypatch):
    """Time as the only thing that passes: `clock[0]` seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Sleeper(nn.Module):
    """Takes as long as `seconds(step)` says, but at its first visit to each kind of step much longer: it compiles."""

    def __init__(self, seconds, clock):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.seconds, self.clock, self.steps, self.compiled = seconds, clock, [], set()

    def forward(self, batch, step):
        self.steps.append(step)
        seconds = self.seconds(step)
        self.clock[0] += seconds if seconds in self.compiled else BREAK
        self.compiled.add(seconds)
        return StepOutput(loss=self.weight.square().mean())


def config(device):
    return TrainerConfig(steps=7, precision="fp32", parallel=ParallelConfig(device=device.type))


def test_a_step_has_the_mean_of_its_kinds_and_of_the_stages_of_the_run(device, tmp_path, monkeypatch, clock):
    monkeypatch.chdir(tmp_path)
    # Every fourth step is slow, and from step 1,000 on all are.
    module = Sleeper(lambda step: (0.04 if (step + 1) % 4 == 0 else 0.01) if step < 1_000 else 0.1, clock)
    found = time_steps(module, ArithmeticStream(), config(device), seconds=0.5, places={0: 0.75, 1_000: 0.25}, cycle=4)
    assert found.seconds == pytest.approx(0.75 * (0.04 + 3 * 0.01) / 4 + 0.25 * 0.1)
    assert found.steps % 4 == 0
    # Three cycles of each place are not counted.
    assert len(module.steps) == 2 * 3 * 4 + found.steps
    assert torch.equal(module.weight.cpu(), torch.ones(2))
    assert not list(tmp_path.iterdir()), "something was saved"


def test_batches_that_were_ready_before_are_not_timed(device, clock):
    class Loader(ArithmeticStream):
        """Is five batches ahead when the timing begins."""

        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number >= 3 + 5:
                    clock[0] += 0.03
                yield batch

    sleeper = Sleeper(lambda _: 0.01, clock)
    found = time_steps(sleeper, Loader(), config(device), seconds=0.0, places={0: 1.0}, prepared=5)
    assert found.steps == 1
    assert found.seconds == pytest.approx(0.03 + 0.01)


def test_a_signal_ends_it_without_a_number(device, clock):
    class Killed(Sleeper):
        def forward(self, batch, step):
            if len(self.steps) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(batch, step)

    killed = Killed(lambda _: 0.01, clock)
    assert time_steps(killed, ArithmeticStream(), config(device), seconds=9.0, places={0: 1.0}) is None
