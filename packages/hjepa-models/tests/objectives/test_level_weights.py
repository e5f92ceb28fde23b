import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.objectives import (
    LevelAverages,
    LevelWeighting,
    LevelWeightsConfig,
    adaptive_weights,
    update_average,
)


def test_fixed_weights_are_the_published_ones():
    assert LevelWeightsConfig().level_weights(12345) == (1.0, 0.7, 0.5)


def test_curriculum_raises_coarse_levels_first():
    config = LevelWeightsConfig(kind="curriculum", ramp_steps=600)
    assert config.level_weights(0) == (0.0, 0.0, 0.0)
    assert config.level_weights(50) == (0.0, 0.0, 0.25)
    assert config.level_weights(150) == (0.0, pytest.approx(0.35), 0.5)
    assert config.level_weights(250) == (0.5, 0.7, 0.5)
    assert config.level_weights(300) == (1.0, 0.7, 0.5)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_curriculum_is_bounded_and_rises(first, second):
    config = LevelWeightsConfig(kind=LevelWeighting.curriculum, weights=(1.0, 0.3), ramp_steps=500)
    early, late = sorted((first, second))
    for a, b, most in zip(config.level_weights(early), config.level_weights(late), config.weights, strict=True):
        assert 0 <= a <= b <= most


def test_ramps_in_steps_and_without_length():
    config = LevelWeightsConfig(kind="curriculum", weights=(1.0, 1.0), ramp_start=(10, 5), ramp_end=(20, 5))
    assert config.level_weights(4) == (0.0, 0.0)
    assert config.level_weights(5) == (0.0, 1.0)
    assert config.level_weights(15) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "learned"}, "allowed: fixed, curriculum, adaptive"),
        ({"momentum": 1.0}, "allowed: 0 <= momentum < 1"),
        ({"momentum": -0.1}, "allowed: 0 <= momentum < 1"),
        ({"weights": (1.0, -1.0)}, "must not be negative"),
        ({"ramp_start": (0.0,)}, "one per level"),
        ({"ramp_start": 0.1}, "ramp_start=0.1: no sequence"),
        ({"weights": 1.0}, "weights=1.0: no sequence"),
        ({"ramp_start": (3, 3, 3), "ramp_end": (2, 4, 4)}, "a ramp ends before"),
        ({"kind": "curriculum"}, "set ramp_steps"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        LevelWeightsConfig(**fields)


def test_adaptive_starts_from_the_base_weights():
    config = LevelWeightsConfig(kind="adaptive", weights=(1.0, 0.7))
    assert config.level_weights(0) == config.level_weights(999) == (1.0, 0.7)
    assert config.momentum == 0.99
    torch.testing.assert_close(adaptive_weights(torch.zeros(2), torch.tensor((1.0, 0.7))), torch.tensor([1.0, 0.7]))


# Four levels: (average loss, base weight); an average of 0 is a level without one.
LEVELS = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), st.one_of(st.just(0.0), st.floats(0.1, 2.0))),
    min_size=4,
    max_size=4,
)


@given(LEVELS)
def test_adaptive_weights_equalise_the_shares_and_keep_the_sum(levels):
    averages, base = zip(*levels, strict=True)
    weights = adaptive_weights(*torch.tensor([averages, base], dtype=torch.float64)).tolist()
    assert sum(weights) == pytest.approx(sum(base))
    known = [(w, a, b) for w, a, b in zip(weights, averages, base, strict=True) if a > 0 and b > 0]
    for weight, average, wanted in zip(weights, averages, base, strict=True):
        assert weight >= 0
        if wanted == 0:
            assert weight == 0
        elif average == 0:
            assert weight == pytest.approx(wanted)
    # What a level adds to the loss, per unit of its base weight, is the same for all.
    shares = [w * a / b for w, a, b in known]
    assert shares == pytest.approx([shares[0]] * len(shares) if shares else [])


def test_adaptive_weights_are_a_known_value_and_carry_no_gradient(device):
    averages = torch.tensor([0.1, 0.4, 5.0], device=device, requires_grad=True)
    weights = adaptive_weights(averages, torch.tensor((1.0, 0.5, 0.0)))
    # 1/a: 10 and 2.5, weighted by the base 10 and 1.25, scaled to the sum 1.5.
    torch.testing.assert_close(weights, torch.tensor([10 * 1.5 / 11.25, 1.25 * 1.5 / 11.25, 0.0], device=device))
    assert weights.device == averages.device
    assert not weights.requires_grad


def test_a_vanishing_loss_takes_the_weight_but_stays_finite():
    weights = adaptive_weights(torch.tensor([1e-40, 1.0]), torch.tensor((1.0, 1.0)))
    assert weights.tolist() == pytest.approx([2.0, 0.0], abs=1e-6)


def test_averages_start_with_the_first_loss_and_then_move(device):
    def losses(*values):
        return torch.tensor(values, device=device, requires_grad=True)

    both = torch.tensor([True, True], device=device)
    average = update_average(torch.zeros(2, device=device), losses(4.0, 1.0), 0.9, both)
    assert average.tolist() == [4.0, 1.0]
    average = update_average(average, losses(2.0, 2.0), 0.9, both)
    assert average.tolist() == pytest.approx([3.8, 1.1])
    assert not average.requires_grad


def test_levels_that_were_not_computed_or_not_finite_keep_their_average(device):
    average = torch.tensor([2.0, 3.0, 0.0, 5.0], device=device)
    losses = torch.tensor([float("nan"), 7.0, 0.5, float("inf")], device=device)
    seen = torch.tensor([True, False, True, True], device=device)
    assert update_average(average, losses, 0.5, seen).tolist() == [2.0, 3.0, 0.5, 5.0]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.floats(0.0, 0.99))
def test_the_average_stays_between_the_losses(values, momentum):
    average, seen = torch.zeros(1, dtype=torch.float64), torch.tensor([True])
    for value in values:
        average = update_average(average, torch.tensor([value]), momentum, seen)
    assert min(values) * (1 - 1e-6) <= float(average) <= max(values) * (1 + 1e-6)


def test_averages_move_once_a_step_however_many_micro_batches_it_has(device):
    def run(steps, count):
        averages = LevelAverages(2, 0.5).to(device)
        averages.init_weights()
        used = []
        for step, losses in enumerate(steps):
            for part in losses.chunk(count):
                clock = torch.tensor(step, device=device)
                used.append(averages(clock))
                averages.observe(clock, part.mean(0))
        return used, averages(torch.tensor(len(steps), device=device))

    steps = torch.rand(5, 6, 2, device=device) + 0.1
    whole, last = run(steps, 1)
    parts, last_of_parts = run(steps, 3)
    torch.testing.assert_close(torch.stack(parts[::3]), torch.stack(whole))
    torch.testing.assert_close(torch.stack(parts[2::3]), torch.stack(whole))  # the same within a step
    torch.testing.assert_close(last_of_parts, last)
    expected = steps[0].mean(0)
    for losses in steps[1:]:
        expected = 0.5 * expected + 0.5 * losses.mean(0)
    torch.testing.assert_close(last, expected)


def test_a_step_whose_losses_are_not_finite_leaves_no_trace_in_the_averages(device):
    averages = LevelAverages(2, 0.5).to(device)
    averages.init_weights()
    for step, losses in enumerate(([1.0, 2.0], [float("nan"), 4.0], [3.0, 2.0])):
        averages.observe(torch.tensor(step, device=device), torch.tensor(losses, device=device))
    assert averages(torch.tensor(3, device=device)).tolist() == [2.0, 2.5]
