import pytest

from hjepa_train import Outcome, ParallelConfig, Precision, TrainerConfig
from hjepa_train.errors import choice, one_line


def test_an_unknown_choice_lists_what_is_allowed():
    with pytest.raises(ValueError, match="precision=fp8: unknown; allowed: bf16, fp32"):
        choice(Precision, "precision", "fp8")


def test_one_line_has_no_break():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"


def test_exit_codes_of_the_outcomes():
    assert [outcome.exit_code for outcome in Outcome] == [0, 75]


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"steps": 1, "accumulate": 0},
        {"steps": 1, "clip_norm": 0.0},
        {"steps": 1, "clip_norm": float("nan")},
        {"steps": 1, "precision": "fp16"},
    ],
)
def test_a_wrong_run_is_refused_in_one_line(fields):
    with pytest.raises(ValueError, match="allowed") as caught:
        TrainerConfig(**fields)
    assert "\n" not in str(caught.value)


def test_a_wrong_layout_is_refused():
    with pytest.raises(ValueError, match="allowed: single, ddp, fsdp"):
        ParallelConfig(kind="tensor")
    with pytest.raises(ValueError, match="allowed: auto, cpu, cuda"):
        ParallelConfig(device="tpu")
