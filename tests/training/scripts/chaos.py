"""Two gloo ranks that are killed again and again: train once undisturbed and once under SIGKILL, print what differs.

Every rank is a fork of this process, which imports torch once. However late a kill comes, the run has gone no further
than its share of the steps: it is held there on a leash. Arguments: work folder, seed.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed.fsdp  # imported once: here, not in every fork

from hjepa_train import (
    Callback,
    Checkpoint,
    CheckpointConfig,
    CheckpointStore,
    MetricsLog,
    ParallelConfig,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
    init_world,
    leave_world,
)
from hjepa_train.checkpoint import store as store_module
from hjepa_train.checkpoint.files import DamagedError
from hjepa_train.sharded import whole
from hjepa_train.testing import ArithmeticStream, ToyBlock, ToyModule

torch.set_num_threads(1)  # threads do not survive a fork

STEPS = 60
PAUSE = 0.01
PATIENCE = 120.0
# Where saves are held: rank and stage. As many kills meet no save.
HOLDS = {
    "ddp": (
        (0, "write_tensors"), (1, "write_tensors"), (0, "write_json"), (0, "write_manifest"), (0, "sync"),
        (0, "replace_text"), (0, "rmtree"),
    ),
    "fsdp": ((1, "write_tensors"), (0, "write_manifest"), (0, "rmtree")),
}  # fmt: skip


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
    """Let the `call`-th call of a function of the save wait for the kill, half-way where that leaves something."""
    owner = shutil if stage == "rmtree" else store_module
    real, left = getattr(owner, stage), [call]

    def held(path, *arguments, **named):
        if stage == "rmtree" and path.name.startswith(".tmp-step"):
            return real(path, *arguments, **named)  # left by an earlier kill: not what retention deletes
        left[0] -= 1
        if left[0] == 0:
            if stage == "write_tensors":
                path.write_bytes(b"half a file")
            elif stage == "rmtree":
                next(path.iterdir()).unlink()
            in_save(folder).touch()
            while leash(folder).exists():
                time.sleep(0.001)
        return real(path, *arguments, **named)

    setattr(owner, stage, held)


def train(folder, kind, store, last):
    torch.manual_seed(0)
    config = TrainerConfig(
        steps=STEPS,
        log_every=1,
        learning_rate=ScheduleConfig(kind="cosine", value=0.02, final=0.0),
        parallel=ParallelConfig(kind=kind, device="cpu"),
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
        blocks=[ToyBlock],
    )
    trainer.fit()
    weights = {name: whole(tensor).numpy().tobytes().hex() for name, tensor in trainer.module.state_dict().items()}
    if world.is_main:
        (folder / "end.json").write_text(json.dumps(weights))
    del trainer
    leave_world()


def start(folder, kind, attempt, last=STEPS, hold=None):
    """Fork two ranks that meet at a store of their own; return their process numbers.

    Args:
        folder: Of the run.
        kind: `ddp` or `fsdp`.
        attempt: Its number.
        last: The step at which the run waits while it is on its leash.
        hold: The rank that waits in a save, the stage of it, and the number of that.
    """
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # makes the pool anew before threads of autograd race to
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
                sys.stderr = (folder / f"errors-{attempt}-{rank}.txt").open("w")
                if hold is not None and rank == hold[0]:
                    hold_in_save(folder, *hold[1:])
                train(folder, kind, folder / f"store-{attempt}", last)
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


def kill_once(folder, kind, attempt, last, place, clock):
    """Start, let the run make some steps, kill one rank or both, in a save the one that is held; tell how it ended."""
    hold = place and (*place, 1 if "rmtree" in place else clock.randint(1, 2))
    before = steps_done(folder)
    leash(folder).touch()
    children = start(folder, kind, attempt, last, hold)
    deadline = time.monotonic() + PATIENCE
    while not in_save(folder).exists() if hold else steps_done(folder) in (before, 0):
        assert time.monotonic() < deadline, "the run made no progress"
        if os.waitpid(children[0], os.WNOHANG) != (0, 0):
            sys.exit((folder / f"errors-{attempt}-0.txt").read_text())
        time.sleep(0.001)
    time.sleep(clock.uniform(0.0, 3 * PAUSE))
    victims = clock.choice([children, [children[place[0]] if place else clock.choice(children)]])
    for child in victims:
        os.kill(child, signal.SIGKILL)
    began = time.monotonic()
    leash(folder).unlink()
    for child in children:
        os.waitpid(child, 0)
    in_save(folder).unlink(missing_ok=True)
    return len(victims), time.monotonic() - began


def damaged(folder):
    """Names of what looks like a checkpoint and is none."""
    found = []
    for path in CheckpointStore(folder / "checkpoints").paths():
        try:
            Checkpoint.open(path)
        except DamagedError:
            found.append(path.name)
    return found


def outcome(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows]
    return losses, json.loads((folder / "end.json").read_text())


def compare(root, kind, clock):
    """Train with kills and without; return what differs."""
    calm, wild = root / "calm", root / "wild"
    for folder in (calm, wild):
        folder.mkdir(parents=True)
    for child in start(calm, kind, 0):
        assert os.waitpid(child, 0)[1] == 0, (calm / "errors-0-0.txt").read_text()
    places = [*HOLDS[kind], *[None] * len(HOLDS[kind])]
    clock.shuffle(places)
    kills, left_alone, broken = len(places), [], []
    for attempt, place in enumerate(places):
        last = -(-STEPS * (attempt + 1) // (kills + 1))
        victims, wait = kill_once(wild, kind, attempt, last, place, clock)
        broken += damaged(wild)
        if victims == 1:
            left_alone.append(wait)
    for child in start(wild, kind, kills):
        assert os.waitpid(child, 0)[1] == 0, (wild / f"errors-{kills}-0.txt").read_text()
    return {
        "killed": kills,
        "slowest end of a rank left alone": max(left_alone, default=0.0),
        "damaged": broken,
        "same losses": outcome(calm)[0] == outcome(wild)[0],
        "same weights": outcome(calm)[1] == outcome(wild)[1],
        "left over": sorted(path.name for path in (wild / "checkpoints").glob(".tmp-*")),
    }


def main():
    root, clock = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()  # imports torch's compiler: here, not in every fork
    print(json.dumps({kind: compare(root / kind, kind, clock) for kind in HOLDS}))


if __name__ == "__main__":
    main()
