"""Clips and their model under the trainer: a run that was stopped ends as one that was not."""

import contextlib
from pathlib import Path

import torch

from hjepa_data import ViewGroup
from hjepa_train import Callback, Outcome, ParallelConfig, Trainer, TrainerConfig
from hjepa_video import ClipStreamConfig, list_clips, video_config
from hjepa_video.testing import write_moving_clip


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, result: object) -> None:
        if trainer.step == self.step:
            trainer.request_stop("enough for now")


def train(clips: Path, folder: Path, *callbacks: Callback) -> tuple[Outcome, dict[str, torch.Tensor], list[int]]:
    stream = ClipStreamConfig(global_batch_size=2, frames=4, view=ViewGroup(size=(64, 64)))
    model = video_config("vit_nano_patch16", frames=4, size=64).build(seed=0)
    config = TrainerConfig(steps=4, parallel=ParallelConfig(device="cpu"))
    with contextlib.closing(stream.build(list_clips(clips), seed=0)) as batches:
        seen: list[int] = []
        model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].sample.tolist()))
        outcome = Trainer(model, batches, config, run_dir=folder, callbacks=callbacks).fit()
    return outcome, model.state_dict(), seen


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(3):
        write_moving_clip(clips / f"{number}.mp4", seed=number)
    whole, expected, order = train(clips, tmp_path / "whole")
    stopped, early, first = train(clips, tmp_path / "stopped", StopAt(2))
    resumed, found, second = train(clips, tmp_path / "stopped")
    assert (whole, stopped, resumed) == (Outcome.DONE, Outcome.PREEMPTED, Outcome.DONE)
    assert (len(first), first + second) == (4, order)
    assert not torch.equal(early["model.predictor.mask_token"], expected["model.predictor.mask_token"])
    assert all(torch.equal(found[name], value) for name, value in expected.items())
