import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hjepa_train import RunLength, ScheduleConfig, ScheduleKind, ScheduleUnit, TrainerConfig
from hjepa_train.schedules import horizon_momentum, progress, warmup

finite = st.floats(-10, 10)


@given(
    kind=st.sampled_from(list(ScheduleKind)),
    value=finite,
    final=finite,
    start=finite,
    warmup_steps=st.integers(0, 40),
    steps=st.integers(41, 200),
)
def test_a_schedule_is_bounded_by_its_ends_and_reaches_them(kind, value, final, start, warmup_steps, steps):
    if kind is ScheduleKind.exponential:
        value, final = abs(value) + 0.1, abs(final) + 0.1
    end = value if kind is ScheduleKind.constant else final
    config = ScheduleConfig(kind=kind, value=value, final=end, warmup_steps=warmup_steps, warmup_start=start)
    values = config.values(np.arange(steps + 10), steps)
    ends = [value, end, start] if warmup_steps else [value, end]
    assert values.min() >= min(ends) - 1e-9
    assert values.max() <= max(ends) + 1e-9
    assert values[warmup_steps] == pytest.approx(value, abs=1e-12)
    assert values[steps] == values[-1] == pytest.approx(end, abs=1e-12)


@given(steps=st.integers(2, 300), step=st.integers(0, 400))
def test_a_schedule_is_a_pure_function_of_the_step(steps, step):
    config = ScheduleConfig(kind=ScheduleKind.cosine, value=1e-3, final=1e-6, warmup_steps=1)
    at = config.build(steps)
    later = at(step + 7)
    assert at(step) == at(step) == float(config.values(np.arange(step, step + 1), steps)[0])
    assert at(step + 7) == later


def test_the_papers_ema_momentum():
    at = ScheduleConfig(kind=ScheduleKind.linear, value=0.996, final=1.0).build(1000)
    assert at(0) == 0.996
    assert at(500) == pytest.approx(0.998)
    assert at(1000) == 1.0


def test_a_horizon_is_a_share_of_the_run_whatever_its_length():
    config = ScheduleConfig(kind=ScheduleKind.linear, value=0.996, horizon=1 / 36, final=1.0)
    assert config.build(1800)(0) == pytest.approx(0.98)
    assert config.build(180_000)(0) == pytest.approx(0.9998)
    assert config.build(1800)(1800) == 1.0
    assert ScheduleConfig(horizon=0.01).build(50)(7) == 0.0  # an average cannot be shorter than a step


@given(share=st.floats(0.01, 1.0), steps=st.integers(200, 20_000))
def test_an_average_with_the_momentum_of_a_horizon_lags_by_it(share, steps):
    """The mean age of what an average holds is m / (1 - m), one step less than its horizon."""
    momentum = horizon_momentum(share, steps)
    ages = np.arange(200 * steps, step=max(1, steps // 50))
    weight = momentum**ages
    assert (ages * weight).sum() / weight.sum() + 1 == pytest.approx(share * steps, rel=0.05, abs=steps // 50 + 1)


def test_samples_and_epochs_are_steps_of_the_global_batch():
    length = RunLength(steps=1000, samples_per_step=64, samples_per_epoch=1000)
    assert length.to_steps(6400, ScheduleUnit.samples) == 100
    assert length.to_steps(6401, ScheduleUnit.samples) == 101
    assert length.to_steps(2, ScheduleUnit.epochs) == 32
    by_samples = ScheduleConfig(
        kind="cosine", value=1.0, final=0.0, warmup_steps=640, steps=6400, unit=ScheduleUnit.samples
    )
    by_steps = ScheduleConfig(kind="cosine", value=1.0, final=0.0, warmup_steps=10, steps=100)
    steps = np.arange(120)
    assert np.array_equal(by_samples.values(steps, length), by_steps.values(steps, length))
    with pytest.raises(ValueError, match="unit=epochs: the trainer does not know samples_per_epoch"):
        RunLength(steps=10, samples_per_step=4).to_steps(1, ScheduleUnit.epochs)
    config = TrainerConfig(steps=1000, samples_per_step=64, samples_per_epoch=1000)
    assert config.length == length


def test_warmup_rises_evenly_and_wastes_no_step():
    values = warmup(np.arange(10), start_value=0.0, value=1.0, steps=9)
    assert values[0] > 0
    assert np.allclose(np.diff(values), 0.1)


@pytest.mark.parametrize("end", [3, 5])
def test_a_way_without_a_length_is_at_its_end(end):
    assert progress(np.arange(5, 8), start=5, end=end).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("learning_rate", {"value": -1e-3}, "learning_rate.value=-0.001: out of range; allowed: 0 and more"),
        ("weight_decay", {"kind": "linear", "value": 0.1, "final": -0.1}, "weight_decay.final=-0.1"),
        ("learning_rate", {"horizon": 0.1}, "learning_rate.horizon=0.1: makes a momentum"),
        ("ema_momentum", {"value": 1.5}, "ema_momentum.value=1.5: out of range; allowed: 0 to 1"),
        ("ema_momentum", {"kind": "linear", "value": 0.9, "final": 2.0}, "ema_momentum.final=2"),
    ],
)
def test_a_schedule_that_its_use_cannot_take_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(steps=5, **{name: ScheduleConfig(**fields)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cosine"}, "final=None"),
        ({"kind": "spiral"}, "allowed: constant, linear, cosine, exponential"),
        ({"kind": "constant", "value": 1.0, "final": 0.0}, "stays at value=1.0; .* use linear or cosine"),
        ({"horizon": 0.1, "value": 0.996, "final": 1.0}, "final=1.0: kind=constant stays at horizon=0.1; .*final=null"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 10, "steps": 10}, "steps=10"),
        ({"horizon": 0.0}, "horizon=0.0"),
        ({"kind": "exponential", "value": 0.0, "final": 1.0}, "both above 0"),
        ({"unit": "furlongs"}, "allowed: steps, samples, epochs"),
        ({"value": float("nan")}, "value=nan: not finite"),
        ({"kind": "linear", "final": float("inf")}, "final=inf: not finite"),
    ],
)
def test_a_wrong_schedule_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        ScheduleConfig(**fields)
    assert "\n" not in str(caught.value)
