import json

import pytest
import torch

from hjepa_train import (
    Profiler,
    ProfilerConfig,
)


def test_the_profiler_writes_a_trace_that_tensorboard_reads(train, device, tmp_path):
    train([Profiler(tmp_path, ProfilerConfig(wait=1, warmup=1, active=2))])
    (path,) = tmp_path.glob("*.pt.trace.json")
    assert path.name.startswith("rank0.")
    trace = json.loads(path.read_text())
    assert {"schemaVersion", "traceEvents", "deviceProperties"} <= trace.keys()
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert any(name.startswith("ProfilerStep#") for name in names)
    assert "aten::addmm" in names
    assert {"ph", "name", "ts", "dur", "cat"} <= next(e.keys() for e in trace["traceEvents"] if e["ph"] == "X")


def test_a_run_that_ends_before_the_profile_is_no_error_and_says_so(train, tmp_path, caplog):
    train([Profiler(tmp_path, ProfilerConfig(wait=100))], steps=2)
    assert not list(tmp_path.glob("*.json"))
    assert "no profile: 2 steps" in caplog.text
    assert "wait=100" in caplog.text


def test_a_wrong_profile_is_refused():
    with pytest.raises(ValueError, match="active=0"):
        ProfilerConfig(active=0)


def test_torch_tb_profiler_reads_the_trace(train, tmp_path):
    data = pytest.importorskip("torch_tb_profiler.profiler.data")
    train([Profiler(tmp_path / "profile", ProfilerConfig(wait=1, warmup=1, active=2))])
    (path,) = (tmp_path / "profile").glob("*.pt.trace.json")
    seen = data.RunProfileData.parse("rank0", "1", str(path), str(tmp_path))
    seen.process()
    assert set(seen.steps_names) == {"2", "3"}  # on a GPU each is named twice, for what the device did too
    calls = {operator.name: operator.calls for operator in seen.op_list_groupby_name}
    assert calls["aten::addmm"] == 2 * 10  # linear layers of the toy, over two steps


@pytest.mark.cuda
def test_the_memory_snapshot_of_a_gpu_is_written(train, device, tmp_path):
    if device.type != "cuda":
        pytest.skip("no CUDA device")
    train([Profiler(tmp_path, ProfilerConfig(wait=1, warmup=1, active=2))])
    assert (tmp_path / "rank0.memory.pickle").stat().st_size > 1000
    assert not torch.cuda.memory._snapshot()["device_traces"][0], "still recording"
