import re
import runpy
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_the_example_of_the_readme_runs(capsys):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert "step 4" in capsys.readouterr().out


@pytest.fixture
def example():
    return runpy.run_path(str(ROOT / "examples" / "train_on_clips.py"))["main"]


def test_the_training_example_runs(example, folder, capsys):
    assert example([str(folder), "--steps", "2", "--batch", "2", "--frames", "4", "--size", "32"]) == 0
    assert "loss_level_2" in capsys.readouterr().out


def test_the_training_example_ends_its_threads_at_an_error(example, folder, monkeypatch):
    def fail(*_):
        raise ValueError("no step")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    assert example([str(folder), "--batch", "2", "--frames", "4", "--size", "32"]) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hjepa-clips")]


def test_the_training_example_refuses_a_wrong_folder_in_one_line(example, tmp_path, capsys):
    assert example([str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "no such folder" in error
    assert error.count("\n") == 1
