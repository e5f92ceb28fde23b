import io
import os
import pty
import re
import threading

from rich.console import Console

from hjepa_train import Callback, ProgressBar
from hjepa_train.callbacks import progress


def test_plain_lines_where_there_is_no_terminal(train):
    output = io.StringIO()
    train([ProgressBar(every_seconds=0.0, console=Console(file=output))])
    lines = output.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("step 6/6  loss ")
    assert "images/s" in lines[-1]
    assert lines[-1].endswith("0:00 left")


class Clock(Callback):
    """Lets the first step take 100 seconds and the others one."""

    def __init__(self):
        self.now = 0.0

    def on_step_end(self, trainer, result):
        self.now += 100.0 if trainer.step == 1 else 1.0

    def monotonic(self):
        return self.now


def test_the_time_left_is_not_that_of_first_steps(train, monkeypatch):
    clock, output = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    train([clock, ProgressBar(every_seconds=0.0, console=Console(file=output))])
    left = [line.split()[-2] for line in output.getvalue().splitlines()]
    assert left == ["8:20", "0:04", "0:02", "0:00"]


def test_a_bar_on_a_terminal(train):
    output = io.StringIO()
    train([ProgressBar(console=Console(file=output, force_terminal=True, width=100))])
    assert "step 6/6" in output.getvalue()
    assert "images/s" in output.getvalue()


def test_a_real_terminal_gets_one_moving_line_with_the_time_left(train, monkeypatch):
    """The output is a pseudo-terminal, as in a user's window."""
    monkeypatch.setenv("TERM", "xterm")
    terminal, child = pty.openpty()
    output: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(terminal, output))
    reader.start()
    with os.fdopen(child, "w") as window:
        train([ProgressBar(console=Console(file=window, width=90))])
    reader.join(timeout=60)
    text = b"".join(output).decode()
    assert "\x1b[" in text, "nothing moved"
    assert re.search(r"step 6/6 .*loss \d\.\d{4} .*images/s .*0:00 left", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text))


def read_all(terminal, output):
    try:
        while part := os.read(terminal, 4096):
            output.append(part)
    except OSError:  # Linux says so when the other end has closed
        pass
