import logging
import math

import pytest
import torch
from torch import nn

from hjepa_train import (
    Callback,
    CollapseError,
    CollapseMonitor,
    MonitorConfig,
    ParallelConfig,
    ScheduleConfig,
    StepOutput,
    Trainer,
    TrainerConfig,
)
from hjepa_train.callbacks.monitor import entropy_rank, read_embeddings
from hjepa_train.testing import ArithmeticStream, ToyModule


class Rows(Callback):
    def __init__(self):
        self.rows = []

    def on_row(self, trainer, row):
        self.rows.append(dict(row))


def train(device, monitor, module=None, *, rate=0.01, steps=100):
    rows = Rows()
    config = TrainerConfig(
        steps=steps,
        clip_norm=None,
        precision="fp32",
        learning_rate=ScheduleConfig(value=rate),
        parallel=ParallelConfig(device=device.type),
    )
    module = ToyModule() if module is None else module
    Trainer(module, ArithmeticStream(batch_size=32), config, callbacks=[monitor, rows]).fit()
    return [row for row in rows.rows if "monitor/alarm" in row]


def test_rankme_is_the_published_formula(device):
    torch.manual_seed(0)
    rows = torch.randn(40, 12, device=device)
    singular = torch.linalg.svdvals(rows.double().cpu())
    share = singular / singular.sum() + 1e-7
    assert entropy_rank(rows.double()) == pytest.approx(math.exp(-float((share * share.log()).sum())))


def test_ranks_of_known_batches(device):
    torch.manual_seed(0)
    isotropic = read_embeddings(torch.randn(2000, 16, device=device))
    assert isotropic.rankme == pytest.approx(16, rel=0.01)
    assert isotropic.std == pytest.approx(1, rel=0.05)
    line = torch.randn(2000, 1, device=device) * torch.randn(1, 16, device=device)
    assert read_embeddings(line).rankme == pytest.approx(1, abs=0.01)
    shifted = read_embeddings(torch.randn(2000, 16, device=device) + 100.0)
    assert shifted.rankme < 2 < 15 < shifted.effective_rank
    assert shifted.spread == pytest.approx(0.01, rel=0.1)


def test_dead_and_broken_embeddings(device):
    dead = read_embeddings(torch.zeros(8, 4, device=device))
    assert (dead.std, dead.spread) == (0.0, 0.0)
    assert math.isnan(read_embeddings(torch.full((8, 4), math.nan, device=device)).rankme)


def test_a_healthy_run_raises_no_alarm(device):
    rows = train(device, CollapseMonitor(MonitorConfig(every=10)))
    assert [row["step"] for row in rows] == [1, *range(10, 101, 10)]
    assert all(row["monitor/alarm"] == 0.0 for row in rows)
    assert all(row["monitor/0/rankme"] > 1.5 for row in rows)


def test_an_absurd_learning_rate_raises_the_alarm_once(device, caplog):
    with caplog.at_level(logging.WARNING):
        rows = train(device, CollapseMonitor(MonitorConfig(every=5)), rate=30.0, steps=60)
    assert rows[0]["monitor/alarm"] == 0.0
    assert rows[-1]["monitor/alarm"] == 1.0
    lines = [record.getMessage() for record in caplog.records if "collapse at level 0" in record.getMessage()]
    assert len(lines) >= 1
    assert len(lines) < sum(row["monitor/alarm"] for row in rows)
    assert "lower the learning rate" in lines[0]


def test_the_policy_stop_ends_the_run(device):
    with pytest.raises(CollapseError, match=r"step \d+: collapse at level 0") as caught:
        train(device, CollapseMonitor(MonitorConfig(every=5, policy="stop")), rate=30.0, steps=60)
    assert "\n" not in str(caught.value)


def test_the_row_of_the_collapse_is_written_before_the_run_ends(device):
    rows = Rows()
    monitor = CollapseMonitor(MonitorConfig(every=1, policy="stop"))
    config = TrainerConfig(steps=3, parallel=ParallelConfig(device=device.type))
    collapsed = Given([torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.ones(64, 32)])
    with pytest.raises(CollapseError, match="step 2"):
        Trainer(collapsed, ArithmeticStream(), config, callbacks=[monitor, rows]).fit()
    assert [(row["step"], row["monitor/alarm"]) for row in rows.rows] == [(1, 0.0), (2, 1.0)]


def test_the_policy_lower_lr_lowers_the_rate_and_a_resumed_run_keeps_it_with_the_policy(device, tmp_path, caplog):
    torch.manual_seed(0)
    line = torch.randn(64, 1) * torch.randn(1, 32)
    embeddings = [torch.randn(64, 32), line, line, torch.randn(64, 32)]

    def run(steps, policy="lower_lr"):
        rows = Rows()
        config = TrainerConfig(
            steps=steps,
            log_every=1,
            learning_rate=ScheduleConfig(value=0.8),
            parallel=ParallelConfig(device=device.type),
        )
        monitor = CollapseMonitor(MonitorConfig(every=1, policy=policy, lr_factor=0.5, lr_floor=0.3))
        Trainer(Given(embeddings), ArithmeticStream(), config, run_dir=tmp_path, callbacks=[monitor, rows]).fit()
        return [row["train/lr"] for row in rows.rows]

    assert run(3) == [0.8, 0.8, 0.4]
    assert "as earlier alarms have left it" not in caplog.text
    assert run(5) == pytest.approx([0.8 * 0.3, 0.8 * 0.3])
    assert caplog.text.count("learning rate at 0.3 of its schedule, as earlier alarms have left it") == 1
    assert run(6, "warn") == [0.8]
    assert run(7) == pytest.approx([0.8 * 0.3])


class Given(nn.Module):
    """Emits the embeddings that it is given, step by step."""

    def __init__(self, embeddings):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.steps = embeddings

    def forward(self, batch, step):
        embeddings = {"0": self.steps[min(step, len(self.steps) - 1)].to(self.weight.device)}
        return StepOutput(loss=self.weight.square().sum(), embeddings=embeddings)


def alarms(device, embeddings, **fields):
    monitor = CollapseMonitor(MonitorConfig(every=1, **fields))
    return [row["monitor/alarm"] for row in train(device, monitor, Given(embeddings), steps=len(embeddings))]


def test_each_kind_of_collapse_is_seen(device):
    torch.manual_seed(0)
    healthy = torch.randn(64, 32)
    line = torch.randn(64, 1) * torch.randn(1, 32)
    constant = torch.ones(64, 32) + 1e-5 * torch.randn(64, 32)
    broken = healthy.clone()
    broken[3, 3] = math.nan
    assert alarms(device, [healthy, line, healthy]) == [0, 1, 0]
    assert alarms(device, [healthy, constant]) == [0, 1]
    assert alarms(device, [healthy, broken]) == [0, 1]
    # The rank of one row or two about their mean says nothing.
    assert alarms(device, [healthy[:2]]) == [0]
    assert alarms(device, [healthy[:1]]) == [0]
    assert alarms(device, [healthy[:3], line[:3]]) == [0, 1]


def test_a_fall_from_an_early_value_is_seen_and_can_be_switched_off(device):
    torch.manual_seed(0)
    healthy = torch.randn(64, 32)
    plane = torch.randn(64, 2) @ torch.randn(2, 32)
    assert alarms(device, [healthy, plane]) == [0, 1]
    assert alarms(device, [healthy, plane], drop=0.0) == [0, 0]


def test_fewer_rows_are_compared_with_as_many(device):
    """More micro-batches to a step leave fewer rows to each, whose rank is lower."""
    torch.manual_seed(0)
    many, few = torch.randn(512, 64), torch.randn(4, 64)
    plane = torch.randn(512, 2) @ torch.randn(2, 64)
    assert alarms(device, [many, few, many]) == [0, 0, 0]
    assert alarms(device, [few, many, plane]) == [0, 0, 1]
    assert alarms(device, [many, few[:2], few[:1]]) == [0, 0, 0]


def test_the_best_reading_survives_a_resume():
    monitor = CollapseMonitor()
    best = {"0": {"n": 64, "effective_rank": 30.0, "spread": 1.0}}
    monitor.load_state_dict({"best": best})
    assert monitor.state_dict() == {"best": best, "lr_scale": 1.0}


def test_a_best_reading_of_an_unknown_number_of_rows_begins_anew(device):
    monitor = CollapseMonitor(MonitorConfig(every=1))
    monitor.load_state_dict({"best": {"0": {"effective_rank": 300.0, "spread": 1.0}}})
    healthy = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert [row["monitor/alarm"] for row in train(device, monitor, Given([healthy]), steps=1)] == [0]
    assert monitor.state_dict()["best"]["0"]["n"] == 64


@pytest.mark.parametrize("fields", [{"every": 0}, {"policy": "x"}, {"max_samples": 2}, {"drop": 1.0}, {"lr_floor": 1}])
def test_a_wrong_monitor_is_refused(fields):
    with pytest.raises(ValueError, match="allowed"):
        MonitorConfig(**fields)
