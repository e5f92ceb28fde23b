"""How many steps a run has time for: what is measured for `run.train_time`, in place of `run.steps`."""

import gc
from collections import Counter
from collections.abc import Sequence

import torch

from hjepa_data import DevicePrefetcher
from hjepa_models import HJEPA, Block
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.failures import Stopped
from hjepa_pretrain.task import PretrainTask, build_task
from hjepa_train import Callback, StepTime, World, time_steps

LONG = 1_000_000
"""Steps of the run that is timed: too many for one of its stages to end meanwhile."""
_SHARE, _LEAST_SECONDS, _MOST_SECONDS = 0.05, 2.0, 20.0
_LOOKS = 1_000


def measure_step(
    config: PretrainConfig, stream: DevicePrefetcher, world: World, seconds: float, callbacks: Sequence[Callback] = ()
) -> StepTime:
    """Time steps of a model that is thrown away; nothing is saved, and the generators are for the run to seed.

    Args:
        config: of a run of `LONG` steps.
        stream: of the run; it is closed.
        world: this process among the others, all of which get the same answer.
        seconds: that the run has; a twentieth of it is timed, 2 s to 20 s.
        callbacks: that may ask for a stop.

    Raises:
        Stopped: a signal or a callback asked for it.
    """
    task = build_task(config)
    workers = config.data.stream(config.trainer.accumulate, world.size).workers
    found = time_steps(
        task,
        stream,
        config.trainer,
        seconds=min(_MOST_SECONDS, max(_LEAST_SECONDS, _SHARE * seconds)),
        places=places(task),
        cycle=task.cycle,
        prepared=-(-workers.count * workers.prefetch // config.trainer.accumulate),
        world=world,
        blocks=(Block,),
        callbacks=callbacks,
    )
    stream.close()
    # The run's own model needs the memory, and the compiler keeps what it has made for a model.
    del task
    torch.compiler.reset()
    gc.collect()
    if found is None:
        raise Stopped("stopped while steps were timed: nothing is lost, and the same command begins again")
    return found


def places(task: PretrainTask) -> dict[int, float]:
    """Return where a run of `LONG` steps gets another cost, with the share of its steps that have it.

    Levels of a curriculum come in one by one, and patches get smaller.

    Args:
        task: of the run.
    """
    model, cycle = task.model, task.cycle
    if not isinstance(model, HJEPA):
        return {0: 1.0}
    first: dict[tuple[object, ...], int] = {}
    count: Counter[tuple[object, ...]] = Counter()
    for look in range(_LOOKS):
        step = LONG * (2 * look + 1) // (2 * _LOOKS) // cycle * cycle
        kinds = tuple(model.plan(step + later) for later in range(cycle))
        first.setdefault(kinds, step)
        count[kinds] += 1
    return {first[kinds]: number / _LOOKS for kinds, number in count.items()}
