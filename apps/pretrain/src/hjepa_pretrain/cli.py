"""`hjepa-pretrain key=value ...`, also `python -m hjepa_pretrain` under torchrun."""

import io
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

USAGE = """\
hjepa-pretrain [key=value ...]

Pretrains a hierarchical JEPA. Without a setting it makes a small demo data set, learns from it for about four minutes
and shows what was learned.

  hjepa-pretrain                                             the demo
  hjepa-pretrain recipe=ijepa                                the demo, another recipe: ijepa, hjepa, hjepa_global,
                                                             hjepa_contrast; baselines: mae, simclr, lejepa, supervised
  hjepa-pretrain data.train='/data/shards/train-*.tar' data.eval='/data/shards/val-*.tar' \\
      model=vit_small_patch16 run.steps=100000               your own shards (hjepa-shards makes them from a folder)
  hjepa-pretrain run.dir=runs/NAME                           go on with a run that was stopped
  torchrun --nproc-per-node=8 -m hjepa_pretrain ...          several processes: parallel=ddp or parallel=fsdp
  hjepa-pretrain --multirun run.seed=0,1,2 recipe=ijepa,hjepa   every combination, each in its folder

Often set: run.dir run.steps or run.train_time (80s, 5m, 8h: as many steps as fit) run.seed run.time_limit (90s, 30m,
11h30m: stop then, and save) data.batch_size data.image_size data.workers checkpoint.every_steps
checkpoint.every_minutes eval.every_steps trainer.learning_rate.value

  hjepa-pretrain plan.show=true [key=value ...]              draw the schedules of a run, and stop
  hjepa-pretrain plan.find_lr=true [key=value ...]           sweep learning rates, suggest one, and stop
  hjepa-pretrain plan.dry=true plan.world_size=256 parallel=fsdp data.batch_size=16384 \\
      plan.models=[vit_large_patch16,vit_huge_patch14]       memory and time of a step on machines elsewhere, and stop
  hjepa-pretrain --settings [key=value ...]                  print every setting with its value, and stop
  hjepa-pretrain --help

Exit codes: 0 done; 2 wrong input (one line says what); 3 diverged or collapsed; 75 stopped early with everything saved,
go on with run.dir=...; 1 anything else. Under torchrun each process exits so, torchrun itself with 1; it hands on
SIGTERM, and SIGUSR1 with --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1.
"""

# Seconds; whoever is still there then says itself what is wrong.
_PATIENCE = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and classes hold letters that not every terminal has.
        sys.stdout.reconfigure(errors="backslashreplace")
    if any(word in ("-h", "--help") for word in words):
        print(USAGE, end="")
        return 0
    if "--multirun" in words:
        from hjepa_pretrain.multirun import multirun

        return multirun([word for word in words if word != "--multirun"])
    return _run(words)


def _run(words: list[str]) -> int:
    show = "--settings" in words
    words = [word for word in words if word != "--settings"]
    main_rank = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(level=logging.INFO if main_rank else logging.ERROR, format="%(message)s", stream=sys.stderr)

    # torch takes seconds to import: --help should not. Signals wait until there is somebody to take them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))

    from omegaconf import OmegaConf
    from rich.console import Console

    from hjepa_pretrain import settings
    from hjepa_pretrain.failures import Stopped, judge
    from hjepa_pretrain.model import command
    from hjepa_pretrain.run import pretrain
    from hjepa_train.signals import StopSignals

    try:
        # While it trains, the trainer has signals of its own.
        with StopSignals(Stopped.by):
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            config, plain = settings.load(words)
            if show:
                if config.run.train_time is not None and not settings.holds_run(config.run.dir):
                    print("run.train_time: how many steps fit is measured when the run begins", file=sys.stderr)
                print(OmegaConf.to_yaml(plain, resolve=True), end="")
                return 0
            # Names of folders are no markup.
            outcome = pretrain(config, plain, words, Console(soft_wrap=True, markup=False, emoji=False))
    except (Exception, KeyboardInterrupt, SystemExit, Stopped) as error:
        failure = judge(error)
        if failure is None:
            raise
        if isinstance(error, settings.SettingsError):
            _let_the_first_speak()
        if failure.line is not None and (main_rank or not failure.alike):
            print(f"hjepa-pretrain: {' '.join(failure.line.split())}", file=sys.stderr)
        return failure.code
    if outcome.exit_code and main_rank:
        print(f"stopped early, everything is saved; go on with: {command(plain.run.dir)}", file=sys.stderr)
    return outcome.exit_code


def _let_the_first_speak() -> None:
    """Wait beside the first process of a machine, which refuses the same words: torchrun ends those that still wait."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_PATIENCE)
