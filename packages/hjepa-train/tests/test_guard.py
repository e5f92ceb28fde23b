"""Bad steps are left out bit for bit, on the host and on the device; too many end the run with a dump."""

import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from hjepa_train import (
    Callback,
    CheckpointConfig,
    CollapseMonitor,
    DivergedError,
    GuardConfig,
    MonitorConfig,
    OptimizerConfig,
    Outcome,
    ParallelConfig,
    ScheduleConfig,
    StepOutput,
    Trainer,
    TrainerConfig,
)
from hjepa_train.guard import Guard, running_median, step_unless
from hjepa_train.optim import set_rates
from hjepa_train.parallel import World
from hjepa_train.testing import ArithmeticStream, ToyModule


class Faulty(ToyModule):
    """Multiplies its loss at some steps, and keeps a running mean of it, as normalisation layers do."""

    def __init__(self, faults):
        super().__init__(dropout=0.1)
        self.faults = faults
        self.register_buffer("running", torch.zeros(()))

    def forward(self, batch, step):
        output = super().forward(batch, step)
        loss = output.loss * self.faults.get(step, 1.0)
        self.running.lerp_(loss.detach(), 0.5)
        return StepOutput(loss=loss, metrics={"loss_level_0": loss}, embeddings=output.embeddings)


class Keep(Callback):
    """What the run is after each step."""

    def __init__(self):
        self.rows, self.states, self.moments = [], [], []

    def on_step_end(self, trainer, result):
        self.states.append({name: value.clone() for name, value in trainer.module.state_dict().items()})
        self.moments.append(
            {
                (name, key): value.clone()
                for name, parameter in trainer.module.named_parameters()
                for key, value in trainer.optimizer.state.get(parameter, {}).items()
            }
        )

    def on_row(self, trainer, row):
        self.rows.append(dict(row))


def build(device, faults, *, deferred=False, optimizer=None, run_dir=None, callbacks=(), steps=12, every=100, **guard):
    torch.manual_seed(0)
    config = TrainerConfig(
        steps=steps,
        log_every=1,
        check_every=4,
        precision="fp32",
        learning_rate=ScheduleConfig(value=0.01),
        ema_momentum=ScheduleConfig(value=0.9),
        guard=GuardConfig(**guard),
        optimizer=OptimizerConfig() if optimizer is None else optimizer,
        parallel=ParallelConfig(device=device.type),
    )
    saving = CheckpointConfig(every_steps=every, every_minutes=None, keep=None)
    trainer = Trainer(
        Faulty(faults), ArithmeticStream(), config, run_dir=run_dir, callbacks=callbacks, checkpoint=saving
    )
    trainer.guard.on_host = trainer.guard.on_host and not deferred
    return trainer


OPTIMIZERS = {
    "fused": OptimizerConfig(fused=True),
    "foreach": OptimizerConfig(fused=False),
    "muon": OptimizerConfig(kind="muon", muon_names=("online.",), fused=True),
}


@pytest.mark.parametrize("deferred", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("faults", [{4: math.nan, 5: math.inf}, {0: math.nan}], ids=["later", "first"])
def test_a_bad_step_changes_nothing_but_the_count(device, deferred, name, faults):
    keep = Keep()
    trainer = build(device, faults, deferred=deferred, optimizer=OPTIMIZERS[name], callbacks=[keep], steps=8)
    before = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    assert trainer.fit() is Outcome.DONE
    for step in range(8):
        earlier = before if step == 0 else keep.states[step - 1]
        same = [torch.equal(value, earlier[key]) for key, value in keep.states[step].items() if key != "mean"]
        assert all(same) if step in faults else not any(same), step
        if step in faults:
            moments = keep.moments[step - 1] if step else {}
            for key, value in keep.moments[step].items():
                assert torch.equal(value, moments.get(key, torch.zeros_like(value))), key
    assert [row["train/skipped"] for row in keep.rows][-1] == len(faults)
    assert all(bool(value.isfinite().all()) for value in trainer.module.state_dict().values())


def test_the_device_and_the_host_take_the_same_steps(device):
    faults = {2: math.nan, 3: math.inf, 7: math.nan}
    ends = []
    for deferred in (False, True):
        trainer = build(device, faults, deferred=deferred, optimizer=OPTIMIZERS["fused"])
        trainer.fit()
        ends.append(trainer.module.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-6, msg=name)


class Normalised(nn.Module):
    """Batch norm of what is not finite at one step: torch's kernel changes its statistics and no tensor's version."""

    def __init__(self, fault):
        super().__init__()
        torch.manual_seed(0)
        self.fault = fault
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def compile_step(self, **options):
        self.layers.compile(**options)

    def forward(self, batch, step):
        values = batch.values * (math.nan if step == self.fault else 1.0)
        return StepOutput(loss=(self.layers(values) - 1.0).square().mean())


@pytest.mark.parametrize("deferred", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_bad_step_leaves_the_statistics_of_batch_norm_alone(device, deferred, compiled):
    keep = Keep()
    config = TrainerConfig(
        steps=4,
        compile=compiled,
        compile_backend="aot_eager",
        precision="fp32",
        parallel=ParallelConfig(device=device.type),
    )
    trainer = Trainer(Normalised(2), ArithmeticStream(), config, callbacks=[keep])
    trainer.guard.on_host = trainer.guard.on_host and not deferred
    trainer.fit()
    assert int(trainer.guard.skipped) == 1
    before, after, last = keep.states[1:4]
    for name in ("layers.1.running_mean", "layers.1.running_var", "layers.1.num_batches_tracked"):
        assert torch.equal(after[name], before[name]), name
        assert bool(last[name].isfinite().all())
        assert not torch.equal(last[name], after[name]), name


def oracle(values, *, spike, window):
    """The naive law: what is bad, step by step."""
    good, bad = [], []
    for loss, norm in values:
        spiked = False
        if len(good) >= window // 5:
            recent = good[-window:]
            medians = [sorted(row[i] for row in recent)[(len(recent) - 1) // 2] for i in (0, 1)]
            spiked = any(value > spike * median > 0 for value, median in zip((loss, norm), medians, strict=True))
        wrong = not (math.isfinite(loss) and math.isfinite(norm))
        bad.append(wrong or spiked)
        if not bad[-1]:
            good.append((loss, norm))
    return bad


special = st.sampled_from([math.nan, math.inf, 1e4])
numbers = st.one_of(st.floats(0.5, 2.0, width=32), st.floats(-1.0, 30.0, width=32), special)


@settings(deadline=None)
@given(values=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40), split=st.integers(0, 40))
def test_spikes_are_those_of_the_naive_law_through_a_resume(values, split):
    config = GuardConfig(spike=3.0, window=7, max_skips=100)

    def guard():
        return Guard(config, nn.Linear(1, 1), World(), check_every=1, folder=None)

    one, bad = guard(), []
    for step, (loss, norm) in enumerate(values):
        if step == split:
            state = json.loads(json.dumps(one.state_dict()))
            one = guard()
            one.load_state_dict(state)
        one.begin(step)
        bad.append(bool(one.judge(torch.tensor(loss), torch.tensor(norm), {})))
    assert bad == oracle(values, spike=3.0, window=7)
    assert int(one.skipped) == sum(bad)


def test_the_state_is_the_window_in_order_and_fits_another_window():
    def guard(window):
        return Guard(GuardConfig(spike=3.0, window=window), nn.Linear(1, 1), World(), check_every=1, folder=None)

    first, shorter = guard(7), guard(5)
    for step in range(10):
        first.begin(step)
        first.judge(torch.tensor(1.0 + step), torch.tensor(2.0 + step), {})
    state = first.state_dict()
    assert state["values"] == [list(map(float, range(4, 11))), list(map(float, range(5, 12)))]
    shorter.load_state_dict(state)
    assert shorter.state_dict()["values"] == [[6.0, 7.0, 8.0, 9.0, 10.0], [7.0, 8.0, 9.0, 10.0, 11.0]]


class InTurn(nn.Linear):
    """Every third step has a loss ten times that of the others."""

    cycle = 3


def watch(module, losses, *, first=0, state=None):
    """Judge steps from `first` on; return the guard and which of them were bad."""
    guard = Guard(GuardConfig(spike=3.0, window=10, max_skips=100), module, World(), check_every=1, folder=None)
    if state is not None:
        guard.load_state_dict(json.loads(json.dumps(state)))
    bad = []
    for step, loss in enumerate(losses, first):
        guard.begin(step)
        bad.append(bool(guard.judge(torch.tensor(loss), torch.tensor(1.0), {})))
        guard.check(step + 1)
    return guard, [step for step, one in enumerate(bad, first) if one]


def test_steps_of_several_kinds_have_a_median_each():
    losses = [10.0 if step % 3 == 2 else 1.0 for step in range(60)]
    losses[40], losses[44] = 9.0, 50.0
    whole, bad = watch(InTurn(1, 1), losses)
    assert bad == [40, 44]
    first, _ = watch(InTurn(1, 1), losses[:35])
    resumed, bad = watch(InTurn(1, 1), losses[35:], first=35, state=first.state_dict())
    assert bad == [40, 44]
    assert resumed.state_dict() == whole.state_dict()
    # Medians of another cycle say nothing here.
    again, bad = watch(nn.Linear(1, 1), [1000.0], first=35, state=first.state_dict())
    assert bad == []
    assert again.state_dict()["values"] == [[1000.0], [1.0]]


def test_many_steps_that_are_left_out_are_said_once(caplog):
    losses = [50.0 if step > 10 and step % 5 == 0 else 1.0 for step in range(80)]
    watch(nn.Linear(1, 1), losses)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("step 21: 2 of the last 10 steps were left out: the loss or its gradient is not finite or ")
    assert line.endswith("above 3 times its running median; lower the learning rate, or raise guard.spike")
    caplog.clear()
    watch(nn.Linear(1, 1), [50.0 if step == 30 else 1.0 for step in range(80)])
    assert not caplog.records


@pytest.mark.parametrize(("max_skips", "told"), [(3, 3 + 2 + 4), (10**9, 100 + 2 + 4)])
def test_no_more_steps_are_remembered_than_a_dump_tells_of(tmp_path, max_skips, told):
    config = GuardConfig(max_skips=max_skips)
    guard = Guard(config, nn.Linear(1, 1), World(), check_every=4, folder=tmp_path)
    for step in range(200):
        guard.begin(step)
        guard.judge(torch.tensor(1.0), torch.tensor(1.0), {})
    dump = guard._dump(200)
    assert [row["step"] for row in json.loads((dump / "rank0.json").read_text())["steps"]] == [*range(201 - told, 201)]


def test_records_hold_no_memory_of_batches():
    guard = Guard(GuardConfig(), nn.Linear(1, 1), World(), check_every=1, folder=None)
    batch = next(iter(ArithmeticStream()))
    memory = weakref.ref(batch.sample.untyped_storage())
    guard.begin(0)
    guard.saw(batch)
    del batch
    gc.collect()
    assert memory() is None


@settings(deadline=None)
@given(rows=st.integers(1, 9), count=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_running_median_is_the_lower_one(rows, count, seed):
    values = torch.rand(2, rows, generator=torch.Generator().manual_seed(seed))
    known = values[:, : min(count, rows)].numpy()
    expected = np.sort(known, axis=1)[:, (known.shape[1] - 1) // 2]
    assert running_median(values, torch.tensor(count)).tolist() == expected.tolist()


@pytest.mark.parametrize("deferred", [False, True], ids=["host", "device"])
def test_too_many_bad_steps_end_the_run_with_a_dump(device, tmp_path, deferred):
    faults = dict.fromkeys(range(4, 7), math.nan)  # one too many at step 7; a GPU is asked at step 8, which is good
    keep = Keep()
    trainer = build(device, faults, deferred=deferred, run_dir=tmp_path, callbacks=[keep], every=3, max_skips=2)
    said = r"step 7: .* for 3 steps in a row.*step_00000007.*remove the newest folder"
    with pytest.raises(DivergedError, match=said) as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    for name, value in trainer.module.state_dict().items():
        assert torch.equal(value, keep.states[3][name]), name
    assert int(trainer.store.newest().state["step"]) == 6
    dump = json.loads((tmp_path / "dumps" / "step_00000007" / "rank0.json").read_text())
    told = {row["step"]: row for row in dump["steps"]}
    assert (told[5]["loss"], told[5]["skipped"], told[4]["skipped"]) == ("nan", True, False)
    assert told[7]["sample"] == list(range(6 * 16, 7 * 16))
    assert told[7]["lr"] == 0.01
    # Where the device decides, the host asks once the gradients of that step are gone.
    assert not trainer.guard.on_host or "predictor.expand.weight" in dump["gradients_not_finite"]
    # The dump is enough to do a step again: its samples, its generator and the weights before it.
    tensors = load_file(tmp_path / "dumps" / "step_00000007" / "rank0.safetensors")
    again = build(device, {})
    again.module.load_state_dict(keep.states[2])
    torch.set_rng_state(tensors["generator/cpu/4"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator/cuda/4"])
    batch = list(zip(range(4), ArithmeticStream(), strict=False))[3][1]
    assert torch.equal(batch.sample, tensors["sample/4"])
    again.module.train()
    assert float(again.module(batch.to(device), 3).loss.detach()) == pytest.approx(told[4]["loss"], rel=1e-6)


def test_the_host_asks_before_each_checkpoint(device, tmp_path):
    """Steps 5 to 7 are bad, the host asks at steps 4 and 8, and a checkpoint is due at step 7."""
    trainer = build(device, dict.fromkeys(range(4, 7), math.nan), deferred=True, run_dir=tmp_path, every=7, max_skips=2)
    with pytest.raises(DivergedError, match="step 7: "):
        trainer.fit()
    assert (trainer.step, trainer.store.newest()) == (7, None)


def test_the_dump_names_the_parameters_that_are_to_blame_and_no_others(device, tmp_path):
    class Spoilt(ToyModule):
        def forward(self, batch, step):
            output = super().forward(batch, step)
            return StepOutput(loss=output.loss + (self.predictor.norm.bias * 0).sqrt().sum())

    config = TrainerConfig(
        steps=2, check_every=1, guard=GuardConfig(max_skips=0), parallel=ParallelConfig(device=device.type)
    )
    with pytest.raises(DivergedError, match="step 1"):
        Trainer(Spoilt(), ArithmeticStream(), config, run_dir=tmp_path).fit()
    dump = json.loads((tmp_path / "dumps" / "step_00000001" / "rank0.json").read_text())
    assert dump["gradients_not_finite"] == ["predictor.norm.bias"]
    assert dump["steps"][-1]["grad_norm"] == "nan"


def test_a_run_resumed_amid_bad_steps_ends_where_the_whole_one_does(device, tmp_path):
    faults = dict.fromkeys(range(5, 9), math.nan)

    class StopAt(Callback):
        def on_step_end(self, trainer, result):
            if trainer.step == 7:
                trainer.request_stop("a test")

    assert build(device, faults, run_dir=tmp_path, callbacks=[StopAt()]).fit() is Outcome.PREEMPTED
    with pytest.raises(DivergedError, match=r"step 9: "):
        build(device, faults, run_dir=tmp_path).fit()


def test_a_spike_is_left_out_and_a_resumed_run_sees_it_too(device, tmp_path):
    class StopAt(Callback):
        def on_step_end(self, trainer, result):
            if trainer.step == 6:
                trainer.request_stop("a test")

    def run(folder, callbacks=()):
        trainer = build(device, {7: 50.0}, run_dir=folder, callbacks=callbacks, spike=10.0, window=10)
        trainer.fit()
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", [StopAt()])
    resumed = run(tmp_path / "parts")
    assert int(whole.guard.skipped) == int(resumed.guard.skipped) == 1
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name
    assert int(build(device, {7: 50.0}).guard.skipped) == 0


def test_the_monitor_does_not_read_a_step_that_was_left_out(device):
    keep = Keep()
    monitor = CollapseMonitor(MonitorConfig(every=1, policy="stop"))
    build(device, {3: math.nan}, callbacks=[monitor, keep], steps=6).fit()
    assert ["monitor/alarm" in row for row in keep.rows] == [True, True, True, False, True, True]


def test_an_optimizer_that_cannot_skip_is_undone(device):
    module = nn.Linear(3, 2).to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    before = module.weight.detach().clone()
    for bad in (True, False):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, math.nan if bad else 1.0)
        step_unless(optimizer, torch.tensor(bad, device=device), on_host=False)
        if bad:
            assert torch.equal(module.weight, before)
    assert torch.allclose(module.weight, before - 0.1)


def test_rates_of_a_skipped_fused_step_do_not_count(device):
    module = nn.Linear(2, 2).to(device)
    optimizer = OptimizerConfig(fused=True).build(module)
    set_rates(optimizer, learning_rate=0.1, weight_decay=0.5)
    before = module.weight.detach().clone()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    step_unless(optimizer, torch.tensor(True, device=device), on_host=False)
    assert torch.equal(module.weight, before)
    assert [float(state["step"]) for state in optimizer.state.values()] == [0.0, 0.0]


@pytest.mark.parametrize("fields", [{"max_skips": -1}, {"spike": 1.0}, {"window": 4}])
def test_a_wrong_guard_is_refused(fields):
    with pytest.raises(ValueError, match="allowed"):
        GuardConfig(**fields)
