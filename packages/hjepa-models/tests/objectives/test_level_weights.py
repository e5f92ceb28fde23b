import pytest
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models import LevelWeighting, LevelWeightsConfig


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
        ({"kind": "adaptive"}, "allowed: fixed, curriculum"),
        ({"weights": (1.0, -1.0)}, "must not be negative"),
        ({"ramp_start": (0.0,)}, "one per level"),
        ({"ramp_start": (3, 3, 3), "ramp_end": (2, 4, 4)}, "a ramp ends before"),
        ({"kind": "curriculum"}, "set ramp_steps"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        LevelWeightsConfig(**fields)
