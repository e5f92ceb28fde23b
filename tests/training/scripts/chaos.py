"""Two gloo ranks that are killed again and again: train once undisturbed and once under SIGKILL, print what differs.

Every rank is a fork of this process, which imports torch once. However late a kill comes, the run has gone no further
than its share of the steps: it is held there on a leash. Arguments: work folder, number of kills (at most 28), seed.
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
    init_world,
    leave_world,
)
from hjepa_train.checkpoint import store as store_module
from hjepa_train.testing import ArithmeticStream, ToyModule

torch.set_num_threads(1)  # threads do not survive a fork

STEPS = 60
PAUSE = 0.01
PATIENCE = 120.0
STAGES = ("write_tensors", "write_json", "write_manifest", "sync", "replace_text")


class Slow(Callback):
    """Makes a step last about as long as a save, so that kills meet both."""

    def __init__(self, folder, last):
        self.folder, self.last = folder, last

    def on_step_end(self, trainer, result):
        time.sleep(PAUSE)
        while trainer.world.is_main and trainer.step >= self.last and leash(self.folder).exists():
            time.sleep(PAUSE)


def leash(folder):
    return folder / "leash"


def in_save(folder):
    """What is there once a save is held."""
    return folder / "in save"


def hold_in_save(folder, stage, call):
    """Let the `call`-th call of a function of the save wait for the kill."""
    real, left = getattr(store_module, stage), [call]

    def held(*arguments):
        left[0] -= 1
        if left[0] == 0:
            in_save(folder).touch()
            while leash(folder).exists():
                time.sleep(0.001)
        return real(*arguments)

    setattr(store_module, stage, held)


def train(folder, store, last):
    torch.manual_seed(0)
    config = TrainerConfig(
        steps=STEPS,
        log_every=1,
        learning_rate=ScheduleConfig(kind="cosine", value=0.02, final=0.0),
        parallel=ParallelConfig(kind="ddp", device="cpu"),
    )
    world = init_world(config.parallel, init_method=f"file://{store}")
    trainer = Trainer(
        ToyModule(dropout=0.2, late_step=5),
        ArithmeticStream(rank=world.rank, size=world.size),
        config,
        world=world,
        run_dir=folder,
        callbacks=[MetricsLog(folder / "metrics.jsonl"), Slow(folder, last)],
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None),
    )
    trainer.fit()
    if world.is_main:
        weights = {name: tensor.numpy().tobytes().hex() for name, tensor in trainer.module.state_dict().items()}
        (folder / "end.json").write_text(json.dumps(weights))
    del trainer
    leave_world()


def start(folder, attempt, last=STEPS, hold=None):
    """Fork two ranks that meet at a store of their own; return their process numbers.

    Args:
        folder: Of the run.
        attempt: Its number.
        last: The step at which the run waits while it is on its leash.
        hold: The stage of a save, and its number, at which the main rank waits.
    """
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # makes the pool anew before threads of autograd race to
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
                sys.stderr = (folder / f"errors-{attempt}-{rank}.txt").open("w")
                if hold is not None and rank == 0:
                    hold_in_save(folder, *hold)
                train(folder, folder / f"store-{attempt}", last)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    return children


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill_once(folder, attempt, kills, clock):
    """Start, let the run make some steps, kill one rank or both, half of them in a save; tell when it met them."""
    hold = (clock.choice(STAGES), clock.randint(1, 2)) if clock.random() < 0.5 else None
    before = steps_done(folder)
    leash(folder).touch()
    children = start(folder, attempt, last=-(-STEPS * (attempt + 1) // (kills + 1)), hold=hold)
    deadline = time.monotonic() + PATIENCE
    while not in_save(folder).exists() if hold else steps_done(folder) in (before, 0):
        assert time.monotonic() < deadline, "the run made no progress"
        if os.waitpid(children[0], os.WNOHANG) != (0, 0):
            sys.exit((folder / f"errors-{attempt}-0.txt").read_text())
        time.sleep(0.001)
    time.sleep(clock.uniform(0.0, 3 * PAUSE))
    victims = clock.choice([children, children[:1], children[1:]])
    for child in victims:
        os.kill(child, signal.SIGKILL)
    began = time.monotonic()
    leash(folder).unlink()
    for child in children:
        os.waitpid(child, 0)
    in_save(folder).unlink(missing_ok=True)
    return "between saves" if hold is None else "saving", len(victims), time.monotonic() - began


def outcome(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows]
    return losses, json.loads((folder / "end.json").read_text())


def main():
    root, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()  # imports torch's compiler: here, not in every fork
    clock = random.Random(seed)
    calm, wild = root / "calm", root / "wild"
    for folder in (calm, wild):
        folder.mkdir()
    for child in start(calm, 0):
        assert os.waitpid(child, 0)[1] == 0, (calm / "errors-0-0.txt").read_text()
    met, left_alone = [], []
    for attempt in range(kills):
        when, victims, wait = kill_once(wild, attempt, kills, clock)
        met.append(when)
        if victims == 1:
            left_alone.append(wait)
    for child in start(wild, kills):
        assert os.waitpid(child, 0)[1] == 0, (wild / f"errors-{kills}-0.txt").read_text()
    report = {
        "killed": len(met),
        "while saving": met.count("saving"),
        "slowest end of a rank left alone": max(left_alone, default=0.0),
        "same losses": outcome(calm)[0] == outcome(wild)[0],
        "same weights": outcome(calm)[1] == outcome(wild)[1],
        "left over": sorted(path.name for path in (wild / "checkpoints").glob(".tmp-*")),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
