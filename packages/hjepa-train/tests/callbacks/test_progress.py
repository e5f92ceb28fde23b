import io
import os
import re

import pytest
from rich.console import Console

from hjepa_train import (
    CheckpointConfig,
    ParallelConfig,
    ProgressBar,
    Trainer,
    TrainerConfig,
)
from hjepa_train.testing import ArithmeticStream, ToyModule


def train(device, callbacks, *, steps=6, run_dir=None):
    config = TrainerConfig(steps=steps, log_every=2, precision="fp32", parallel=ParallelConfig(device=device.type))
    cadence = CheckpointConfig(every_steps=2)
    trainer = Trainer(ToyModule(), ArithmeticStream(), config, run_dir=run_dir, callbacks=callbacks, checkpoint=cadence)
    trainer.fit()
    return trainer


def test_plain_lines_where_there_is_no_terminal(device):
    output = io.StringIO()
    train(device, [ProgressBar(every_seconds=0.0, console=Console(file=output))])
    lines = output.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("step 6/6  loss ")
    assert "images/s" in lines[-1]
    assert lines[-1].endswith("0:00 left")


def test_a_bar_on_a_terminal(device):
    output = io.StringIO()
    train(device, [ProgressBar(console=Console(file=output, force_terminal=True, width=100))])
    assert "step 6/6" in output.getvalue()
    assert "images/s" in output.getvalue()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_real_terminal_gets_one_moving_line_with_the_time_left(device):
    """In a child whose output is a pseudo-terminal, as in a user's window."""
    import pty

    child, terminal = pty.fork()
    if child == 0:
        try:
            os.environ["TERM"] = "xterm"
            with os.fdopen(1, "w", closefd=False) as window:
                train(device, [ProgressBar(console=Console(file=window, width=90))])
        finally:
            os._exit(0)
    output = b""
    while True:
        try:
            read = os.read(terminal, 4096)
        except OSError:  # the child has gone
            break
        if not read:
            break
        output += read
    os.waitpid(child, 0)
    text = output.decode()
    assert "\x1b[" in text, "nothing moved"
    assert re.search(r"step 6/6 .*loss \d\.\d{4} .*images/s .*0:00 left", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text))
