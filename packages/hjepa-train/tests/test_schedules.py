import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hjepa_train import ScheduleConfig, ScheduleKind
from hjepa_train.schedules import warmup

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


def test_warmup_rises_evenly_and_wastes_no_step():
    values = warmup(np.arange(10), start_value=0.0, value=1.0, steps=9)
    assert values[0] > 0
    assert np.allclose(np.diff(values), 0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cosine"}, "final=None"),
        ({"kind": "spiral"}, "allowed: constant, linear, cosine"),
        ({"kind": "constant", "value": 1.0, "final": 0.0}, "use linear or cosine"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 10, "steps": 10}, "steps=10"),
    ],
)
def test_a_wrong_schedule_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        ScheduleConfig(**fields)
    assert "\n" not in str(caught.value)
