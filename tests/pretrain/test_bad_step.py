"""A step that is not finite is left out of what the model keeps of its batches, too."""

import math

import torch
from safetensors.torch import load_file

from hjepa_pretrain.task import PretrainTask


def test_a_bad_step_leaves_no_trace_in_the_statistics_of_batch_norm(pretrain, tiny, tmp_path, capsys, monkeypatch):
    prepare = PretrainTask._prepare

    def spoilt(self, view, step, sample, number):
        return prepare(self, view, step, sample, number) * (math.nan if step == 2 else 1.0)

    monkeypatch.setattr(PretrainTask, "_prepare", spoilt)
    words = ("recipe=hjepa_global", "run.steps=4", "eval.at_end=false")
    done = pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, *words)
    assert done.code == 0, done.err
    (file,) = (tmp_path / "run" / "checkpoints" / "step_00000004").glob("*.safetensors")
    statistics = {name: value for name, value in load_file(file).items() if "running_" in name}
    assert statistics
    assert [name for name, value in statistics.items() if not bool(torch.isfinite(value).all())] == []
