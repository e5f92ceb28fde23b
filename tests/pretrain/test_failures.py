"""A machine that breaks is one line, and no bug is taken for it."""

import os
import re
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from hjepa_pretrain.failures import broken_machine, judge


def test_a_model_that_no_memory_holds_is_one_line(pretrain, tiny, tmp_path, capsys):
    words = ("recipe=hjepa", "data.views=1", "hjepa.pyramid.fpn_dim=100000000")
    done = pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, *words)
    assert done.code == 1
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert "out of memory" in done.message


def test_a_rank_that_is_gone_is_one_line():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(dist.DistError) as caught:
            dist.TCPStore("127.0.0.1", closed.getsockname()[1], timeout=timedelta(milliseconds=200))
    said = broken_machine(caught.value)
    assert "another process of the run is gone" in said
    assert "\n" not in said


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_one_line(tmp_path, monkeypatch):
    from torch._inductor import config, exc

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch({"cpp.cxx": (None, "/nowhere/g++")}), pytest.raises(exc.InductorError) as caught:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    failure = judge(caught.value)
    assert failure.code == 1
    assert re.fullmatch(r"trainer.compile=true: No working C\+\+ compiler found; install one .*", failure.line)


def test_a_reader_that_has_gone_is_one_line(tiny, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hjepa_pretrain", f"run.dir={tmp_path}/run", *tiny]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("hjepa-pretrain: nobody reads what is printed any more")


def test_an_error_of_the_program_is_none_of_these():
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert judge(caught.value) is None
    # Nor is one of a library that lies in a folder of this name.
    library = compile("raise ValueError('inner')", "/home/me/hjepa_env/lib/site-packages/other.py", "exec")
    with pytest.raises(ValueError, match="inner") as caught:
        exec(library, {"__name__": "other"})
    assert judge(caught.value) is None
