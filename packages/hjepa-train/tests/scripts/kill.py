"""Kill trainings with SIGKILL at many moments and resume them; print what differs from an undisturbed run.

Each training is a fork of this process, so that torch is imported once.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from hjepa_train import (
    Callback,
    CheckpointConfig,
    MetricsLog,
    ParallelConfig,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
)
from hjepa_train.checkpoint import files, store
from hjepa_train.testing import ArithmeticStream, ToyModule

torch.set_num_threads(1)  # threads do not survive a fork

STEPS = 16


class KillAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_row(self, trainer, row):
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Slow(Callback):
    def on_step_end(self, trainer, result):
        time.sleep(0.01)


def train(folder, callbacks=()):
    torch.manual_seed(0)
    config = TrainerConfig(
        steps=STEPS,
        log_every=1,
        learning_rate=ScheduleConfig(kind="cosine", value=0.02, final=0.0),
        parallel=ParallelConfig(device="cpu"),
    )
    trainer = Trainer(
        ToyModule(dropout=0.2, late_step=5),
        ArithmeticStream(),
        config,
        run_dir=folder,
        callbacks=[MetricsLog(folder / "metrics.jsonl"), *callbacks],
        checkpoint=CheckpointConfig(every_steps=4, keep=2),
    )
    trainer.fit()
    torch_bits = {name: tensor.numpy().tobytes().hex() for name, tensor in trainer.module.state_dict().items()}
    (folder / "end.json").write_text(json.dumps(torch_bits))


def kill_in_save(module, name, call):
    """Let the `call`-th call of a function of the save die half-way."""
    real = getattr(module, name)
    left = [call]

    def deadly(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            if name == "write_tensors":
                Path(args[0]).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, deadly)


def forked(work, kill_after=None):
    """Run `work` in a fork; return the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # makes the pool anew before threads of autograd race to
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "a training failed"
        return 0
    return os.WTERMSIG(status)


def outcome(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows], json.loads((folder / "end.json").read_text())


def main():
    root = Path(sys.argv[1])
    train(root / "warm")  # torch imports its compiler with the first optimizer: once here, not in every fork
    forked(lambda: train(root / "whole"))
    whole = outcome(root / "whole")
    moments = {f"step-{step}": (lambda step=step: [KillAt(step)]) for step in (1, 4, 7, 15)}
    stages = ((store, "write_tensors"), (store, "write_json"), (store, "write_manifest"), (files, "sync"))
    stages += ((store, "replace_text"),)
    for module, name in stages:
        for call in (1, 2):
            moments[f"{name}-{call}"] = lambda at=(module, name, call): kill_in_save(*at) or []
    report = {"killed": [], "survived": [], "different": []}
    for name, prepare in moments.items():
        folder = root / name
        ended = forked(lambda prepare=prepare, folder=folder: train(folder, prepare()))
        report["killed" if ended == signal.SIGKILL else "survived"].append(name)
        finish(folder, name, whole, report)
    clock = random.Random(0)
    for attempt in range(3):
        folder = root / f"random-{attempt}"
        folder.mkdir()
        for _ in range(3):
            forked(lambda folder=folder: train(folder, [Slow()]), kill_after=clock.uniform(0.02, 0.25))
        finish(folder, f"random-{attempt}", whole, report)
    print(json.dumps(report))


def finish(folder, name, whole, report):
    forked(lambda: train(folder))
    if outcome(folder) != whole or list((folder / "checkpoints").glob(".tmp-*")):
        report["different"].append(name)


if __name__ == "__main__":
    main()
