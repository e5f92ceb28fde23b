import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from hjepa_models.patch_schedule import PatchScheduleConfig


def test_equal_shares_by_default():
    schedule = PatchScheduleConfig(total_steps=1000)
    sizes = [schedule.patch_size(step) for step in range(1000)]
    assert sizes == [8] * 250 + [4] * 250 + [2] * 250 + [1] * 250
    assert schedule.patch_size(10**6) == 1


def test_boundaries_in_steps_and_in_fractions():
    in_steps = PatchScheduleConfig(sizes=[16, 4, 2], boundaries=[10, 15])
    in_fractions = PatchScheduleConfig(sizes=(16, 4, 2), boundaries=(0.5, 0.75), total_steps=20)
    for step in range(25):
        expected = 16 if step < 10 else 4 if step < 15 else 2
        assert in_steps.patch_size(step) == in_fractions.patch_size(step) == expected
    assert in_steps.sizes == (16, 4, 2)


@given(st.integers(2, 500), st.integers(1, 99))
@example(100, 7)  # 0.07 * 100 is above 7
def test_a_fraction_that_falls_on_a_step_starts_there(total, percent):
    schedule = PatchScheduleConfig(sizes=(2, 1), boundaries=(percent / 100,), total_steps=total)
    for step in range(total):
        assert schedule.patch_size(step) == (1 if 100 * step >= percent * total else 2)


@given(
    st.lists(st.integers(2, 4), min_size=1, max_size=4), st.integers(2, 200), st.integers(0, 400), st.integers(0, 400)
)
def test_it_never_rises_and_uses_every_size_of_a_long_run(ratios, total, first, second):
    sizes = [1]
    for ratio in ratios:
        sizes.insert(0, sizes[0] * ratio)
    schedule = PatchScheduleConfig(sizes=tuple(sizes), total_steps=total)
    early, late = sorted((first, second))
    assert schedule.patch_size(early) >= schedule.patch_size(late)
    if total >= len(sizes):
        assert {schedule.patch_size(step) for step in range(total)} == set(sizes)


def test_a_compiled_step_is_compiled_once_per_size(device):
    schedule = PatchScheduleConfig(total_steps=20)

    def step(images, number):
        size = schedule.patch_size(number)
        return images.unfold(-1, size, size).sum(-1)

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    images = torch.randn(2, 16, device=device)
    for number in range(22):
        torch.testing.assert_close(compiled(images, number), step(images, number))
    # One more: the second step makes the number a symbol.
    assert counter.frame_count == 4 + 1


def test_one_size_needs_no_length():
    assert PatchScheduleConfig(sizes=(4,)).patch_size(7) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ()}, "needs one positive size"),
        ({"sizes": (4, 0)}, "needs one positive size"),
        ({"sizes": (4, 4)}, "no smaller divisor"),
        ({"sizes": (2, 4)}, "no smaller divisor"),
        ({"sizes": (8, 3)}, "3 after 8 is no smaller divisor"),
        ({}, "total_steps=1: the default boundaries"),
        ({"total_steps": 0}, "must be above 0"),
        ({"boundaries": (5, 9)}, "has 2 entries .* needs 3"),
        ({"boundaries": (5, 9, 9)}, "a size would have no step"),
        ({"boundaries": (0, 5, 9)}, "a size would have no step"),
        ({"boundaries": (0.1, 0.5, 1.0), "total_steps": 100}, "ends before the last size"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        PatchScheduleConfig(**fields)
    assert "\n" not in str(caught.value)
