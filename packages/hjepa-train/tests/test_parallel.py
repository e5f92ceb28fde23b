"""Two gloo processes are one process: losses, weights, checkpoints, stops and failures."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hjepa_train import (
    Callback,
    CheckpointStore,
    FSDPConfig,
    Outcome,
    ParallelConfig,
    World,
    init_world,
    leave_world,
)
from hjepa_train.parallel import wrap
from hjepa_train.sharded import local

SCRIPTS = Path(__file__).parent / "scripts"
LIMIT = 500


def launch(script, *arguments):
    """Start two ranks of a script; return (exit code, standard output, standard error) of each."""
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def load_ranks_script():
    spec = importlib.util.spec_from_file_location("ranks_script", SCRIPTS / "ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same trainings by one process, by DDP 2 and by FSDP 2."""
    root = tmp_path_factory.mktemp("runs")
    script = load_ranks_script()
    parallel = ParallelConfig(device="cpu")
    for name, case in script.CASES.items():
        script.train(case, parallel, init_world(parallel), root / "single" / name)
    main, other = launch("ranks.py", root)
    assert main[0] == other[0] == 0, main[2] + other[2]
    return root, script, json.loads(main[1].splitlines()[-1])


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    tensors = CheckpointStore(folder / "checkpoints").at(5).tensors()
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("generator", "rank"))}


def assert_same_weights(folder, reference, tolerance=2e-6):
    mine, theirs = weights(folder), weights(reference)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(mine[name], tensor, atol=tolerance), name


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["plain", "accumulate", "late", "skipped", "undone"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_like_one_process(kind, case, runs):
    root, *_ = runs
    mine, theirs = rows(root / kind / case), rows(root / "single" / case)
    assert [row["step"] for row in mine] == [1, 2, 3, 4, 5]
    for name in ("train/loss", "train/grad_norm", "train/loss_level_0", "train/samples", "train/lr"):
        found, expected = ([row[name] for row in run if row[name] is not None] for run in (mine, theirs))
        assert found == pytest.approx(expected, rel=1e-4), name
    assert [row["train/skipped"] for row in mine] == [0, 0, *[int("bad_step" in runs[1].CASES[case])] * 3]
    for name in ("monitor/0/rankme", "monitor/0/spread"):
        assert mine[1][name] == pytest.approx(theirs[1][name], rel=1e-3)
    assert_same_weights(root / kind / case, root / "single" / case)


@pytest.mark.distributed
def test_accumulation_is_a_larger_batch(runs):
    root, *_ = runs
    for kind in ("single", "ddp", "fsdp"):
        assert_same_weights(root / kind / "accumulate", root / "single" / "plain", tolerance=2e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "name"), [("ddp", "c10d::allreduce_"), ("fsdp", "c10d::_reduce_scatter_base_")])
def test_accumulation_averages_gradients_once_a_step(kind, name, runs):
    once, four_times = runs[2][f"{kind} reductions"]
    assert once[name] >= 2
    assert four_times == once


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_dump_blames_the_gradient_that_is_not_finite_alone(kind, runs):
    assert runs[2][f"{kind} blamed"] == ["mask_token"]


@pytest.mark.distributed
def test_weights_that_stay_gathered_are_sent_less_often(runs):
    root, _, outcomes = runs
    assert_same_weights(root / "fsdp" / "kept", root / "single" / "plain")
    assert 0 < outcomes["kept gathers"] < outcomes["freed gathers"]


@pytest.mark.distributed
def test_what_is_sent_in_half_precision_is_rounded_and_what_is_kept_is_not(runs):
    root, *_ = runs
    half, plain = weights(root / "fsdp" / "half"), weights(root / "single" / "plain")
    assert {name: tensor.dtype for name, tensor in half.items()} == {name: t.dtype for name, t in plain.items()}
    assert_same_weights(root / "fsdp" / "half", root / "single" / "plain", tolerance=0.03)
    apart = max(float((half[name] - plain[name]).abs().max()) for name in plain if name.startswith("model/"))
    assert apart > 1e-4, "nothing was rounded"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_the_run_resumes(kind, runs):
    root, _, outcomes = runs
    assert outcomes[kind] == ["preempted", "done"]
    assert (root / kind / "stopped" / "checkpoints" / "step_00000002").is_dir()
    assert rows(root / kind / "stopped")[-1]["train/loss"] == rows(root / kind / "plain")[-1]["train/loss"]
    assert_same_weights(root / kind / "stopped", root / kind / "plain", tolerance=0.0)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_ranks_is_resumed_by_one(kind, runs, tmp_path):
    root, script, _ = runs
    parallel = ParallelConfig(device="cpu")
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(root / "single" / "plain", one)
    shutil.copytree(root / kind / "plain", two)
    for folder in (one, two):
        assert script.train({}, parallel, init_world(parallel), folder, steps=8) is Outcome.DONE
    expected = rows(one)[-1]["train/loss"]
    assert rows(two)[-1]["train/loss"] == pytest.approx(expected, rel=1e-4)
    assert [row["step"] for row in rows(two)] == list(range(1, 9))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_buffers_that_differ_between_ranks_go_on_as_if_undisturbed(kind, tmp_path):
    outputs = launch("buffers.py", tmp_path, kind)
    for code, out, err in outputs:
        assert code == 0, err
        equal = json.loads(out.splitlines()[-1])
        assert {"model/layers.1.running_mean", "rank/layers.1.running_var"} <= equal.keys()
        assert [name for name, same in equal.items() if not same] == []
    for line in ("stopped after step 3 of 6 (a test)", "resumed at step 3 of 6"):
        assert [line in err for _, _, err in outputs] == [True, False]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_compiled_step_of_several_buckets_trains_like_a_plain_one(tmp_path):
    main, other = launch("compiled.py", tmp_path)
    assert main[0] == other[0] == 0, main[2] + other[2]
    outcomes = json.loads(main[1].splitlines()[-1])
    assert outcomes.keys() == {"kept", "ToyBlock"}
    for outcome in outcomes.values():
        # torch cuts the graph of a step where a bucket is full, to send it while the backward pass goes on.
        assert outcome["graphs"] > 1
        assert outcome["moved"] > 25
        assert outcome["far"] < 1e-3


@pytest.mark.parametrize(("visible", "expected"), [(4, 3), (1, 0)])
def test_a_rank_takes_its_gpu_or_the_only_one_that_it_is_shown(monkeypatch, visible, expected):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert init_world(ParallelConfig()).device == torch.device("cuda", expected)
    assert taken == [torch.device("cuda", expected)]


@pytest.mark.parametrize("visible", [1, 2])
def test_more_ranks_than_gpus_are_refused_in_one_line(monkeypatch, visible):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("there is no such device"))
    with pytest.raises(ValueError, match=f"LOCAL_RANK=3: {visible} CUDA devices are visible; start as many") as caught:
        init_world(ParallelConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_failing_rank_or_its_full_disk_shows_its_error_and_stops_the_other(kind, tmp_path):
    first, second = launch("failing_rank.py", tmp_path, kind)
    assert first[0] != 0
    assert second[0] != 0
    assert "rank 1 of 2 failed at step 3: this machine is gone" in second[2]
    assert "rank 0 of 2 failed at step 3" in first[2]
    told = r"rank {} of 2 failed at step \d+: \S*step_00000003: not saved"
    assert re.search(
        told.format(1) + r" \(.*File too large.*\); newest .* is whole: step_00000002; make room", second[2]
    )
    assert re.search(told.format(0) + "; another rank could not write its part, and says why", first[2])
    folder = tmp_path / "full" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    assert CheckpointStore(folder).newest().state["step"] == 2


@pytest.mark.parametrize("collective", ["sum", "any", "from_main", "gather"])
def test_leaving_waits_for_a_thread_of_gloo_that_is_late(collective, monkeypatch):
    world, held = World(size=2), []
    arguments = {"sum": torch.ones(2), "any": True, "from_main": 7, "gather": torch.ones(2)}
    init_world(ParallelConfig(kind="fsdp", device="cpu"))
    with monkeypatch.context() as patch:
        for name in ("all_reduce", "broadcast", "all_gather"):
            patch.setattr(torch.distributed, name, lambda *tensors, **_: held.append(tensors))
        getattr(world, collective)(arguments[collective])
    assert held
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 5:
            held.clear()

    monkeypatch.setattr(time, "sleep", sleep)
    leave_world()
    assert not held


def test_one_process_needs_no_group(device, monkeypatch):
    world = init_world(ParallelConfig(kind="ddp", device=device.type))
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.any(True, False) == (True, False)
    assert world.from_main(7) == 7
    tensor = torch.ones(2, device=device)
    assert world.gather(tensor) is tensor
    assert world.sum(tensor) is tensor
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="parallel=single: torchrun started 2 processes; use parallel=ddp"):
        init_world(ParallelConfig(device=device.type))


class Places(Callback):
    """Where weights and running means of the optimizer lie."""

    def on_fit_end(self, trainer, outcome):
        states = trainer.optimizer.state.values()
        means = [value for state in states for name, value in state.items() if name != "step"]
        self.found = {local(tensor).device.type for tensor in (*trainer.module.parameters(), *means)}


@pytest.mark.cuda
def test_shards_in_the_memory_of_the_host_train_like_those_on_the_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    script = load_ranks_script()
    for place, offload in (("cuda", False), ("cpu", True)):
        parallel = ParallelConfig(kind="fsdp", device="cuda", fsdp=FSDPConfig(cpu_offload=offload))
        places = Places()
        script.train({}, parallel, init_world(parallel), tmp_path / place, [places])
        assert places.found == {place}
    leave_world()
    losses = {place: [row["train/loss"] for row in rows(tmp_path / place)] for place in ("cuda", "cpu")}
    assert losses["cpu"] == pytest.approx(losses["cuda"], rel=1e-5)
    assert_same_weights(tmp_path / "cpu", tmp_path / "cuda")


def test_offloading_without_a_gpu_is_refused():
    parallel = ParallelConfig(kind="fsdp", device="cpu", fsdp=FSDPConfig(cpu_offload=True))
    with pytest.raises(ValueError, match=r"cpu_offload=true: .* use it with device=cuda"):
        wrap(torch.nn.Linear(2, 2), parallel, World())


def test_what_torchrun_starts_again_remembers_what_was_first(monkeypatch):
    assert [World().first("run", value) for value in (1, 2)] == [1, 2]
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert [World().first("run", value) for value in (3, 4)] == [3, 3]
    assert World().first("other", 5) == 5


def test_a_world_is_a_cpu_by_default():
    assert World().device == torch.device("cpu")
