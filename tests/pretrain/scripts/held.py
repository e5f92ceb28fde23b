"""The pretrain program, held at step HOLD_STEP while the file HOLD_FILE is there, or until a signal asks it to stop.

With `-m NAME ...` another module that runs it in its process.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from hjepa_pretrain.cli import main
from hjepa_train import MetricsLog

LEASH, STEP = Path(os.environ["HOLD_FILE"]), int(os.environ["HOLD_STEP"])
write = MetricsLog.on_row


def write_and_wait(self, trainer, row):
    """Hold the main rank, for which the others wait."""
    write(self, trainer, row)
    while trainer.world.is_main and row["step"] >= STEP and LEASH.exists() and trainer.stop_reason is None:
        time.sleep(0.01)


if __name__ == "__main__":
    MetricsLog.on_row = write_and_wait
    if sys.argv[1] == "-m":
        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.exit(main())
