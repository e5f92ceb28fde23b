"""Blocks that run again in the backward pass, and compiled steps, train like plain ones."""

import logging

import pytest
import torch
from torch import nn

from hjepa_train import ParallelConfig, Trainer, TrainerConfig
from hjepa_train.graph import CompileMode, compile_module, multiply_in_fp8
from hjepa_train.testing import ArithmeticStream, ToyBlock, ToyModule


class CompiledToy(ToyModule):
    """Knows what of its step can be compiled."""

    options = None

    def compile_step(self, **options):
        self.options = options
        self.online.compile(**options)


def weights(device, module, width=8, **fields):
    parallel = ParallelConfig(device=device.type)
    config = TrainerConfig(steps=4, precision="fp32", parallel=parallel, **fields)
    trainer = Trainer(module, ArithmeticStream(width=width), config, blocks=[ToyBlock])
    trainer.fit()
    return {name.replace("._orig_mod", ""): value for name, value in trainer.module.state_dict().items()}


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(mine[name], value, atol=1e-6), name


def test_recomputed_blocks_give_the_same_weights_dropout_included(device):
    runs = []
    for recompute in ((), ("ToyBlock",)):
        torch.manual_seed(0)
        runs.append(weights(device, ToyModule(dropout=0.3), recompute=recompute))
    assert_equal(*runs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own tracing
@pytest.mark.parametrize("module", [ToyModule, CompiledToy])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_blocks_keep_less(compiled, module, device):
    kept = []
    for names in ((), ("ToyBlock",)):
        torch._dynamo.reset()
        config = TrainerConfig(
            steps=1,
            precision="fp32",
            recompute=names,
            compile=compiled,
            compile_backend="aot_eager",
            parallel=ParallelConfig(device=device.type),
        )
        trainer = Trainer(module(width=32), ArithmeticStream(width=32), config, blocks=[ToyBlock])
        there = {parameter.data_ptr() for parameter in trainer.module.parameters()}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            trainer.model(next(iter(trainer.stream)).to(device), 0)
        kept.append(sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in there))
    assert kept[1] < 0.5 * kept[0]


def test_a_block_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=r"recompute=Blok: no such block in the model; allowed: .*ToyBlock"):
        weights(device, ToyModule(), recompute=("Blok",))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own tracing
@pytest.mark.parametrize("module", [ToyModule, CompiledToy])
def test_a_compiled_run_gives_the_same_weights(module, device):
    torch._dynamo.reset()
    assert_equal(weights(device, module(), compile=True, compile_backend="aot_eager"), weights(device, ToyModule()))


def test_a_module_compiles_its_own_step_and_fsdp_its_blocks():
    module = CompiledToy()
    compile_module(module, [ToyBlock], whole=True, backend="eager")
    assert module.options == {"backend": "eager"}
    other = CompiledToy()
    compile_module(other, [ToyBlock], whole=False, backend="eager")
    assert other.options is None
    compiled = [name for name, child in other.named_modules() if child._compiled_call_impl is not None]
    assert compiled == ["online.0", "online.1", "predictor", "target.0", "target.1"]
    plain = nn.Linear(2, 2)
    compile_module(plain, [], whole=True, backend="eager")
    assert plain._compiled_call_impl is not None


def test_an_unknown_backend_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^compile_backend=inducto: .*allowed: .*inductor.*aot_eager") as caught:
        compile_module(CompiledToy(), [], whole=True, backend="inducto")
    assert "\n" not in str(caught.value)


def test_a_cpu_says_that_it_compiles_for_minutes(caplog):
    with caplog.at_level(logging.INFO):
        for backend in ("inductor", "aot_eager"):
            parallel = ParallelConfig(device="cpu")
            config = TrainerConfig(steps=1, compile=True, compile_backend=backend, parallel=parallel)
            Trainer(ToyModule(), ArithmeticStream(), config)
    assert len([record for record in caplog.records if "C++ compiler" in record.message]) == 1


def test_a_mode_reaches_the_compiler_and_graphs_want_one_pass():
    module = CompiledToy()
    compile_module(module, [], whole=True, backend="inductor", mode=CompileMode.reduce_overhead)
    assert module.options == {"backend": "inductor", "mode": "reduce-overhead"}
    for fields in ({"accumulate": 2}, {"parallel": ParallelConfig(kind="ddp", device="cpu")}):
        with pytest.raises(ValueError, match=r"compile_mode=reduce_overhead: .*accumulate=1 and parallel=single"):
            TrainerConfig(steps=1, compile_mode="reduce_overhead", **fields)


@pytest.mark.slow
def test_products_of_8_bits_train_nearly_alike_and_leave_the_state_as_it_is():
    pytest.importorskip("torchao")
    cpu = torch.device("cpu")
    start = ToyModule(width=16).state_dict()
    plain, rough = (weights(cpu, ToyModule(width=16), width=16, fp8=fp8) for fp8 in (False, True))
    assert plain.keys() == rough.keys()
    apart = torch.cat([(rough[name] - plain[name]).flatten() for name in plain]).norm()
    moved = torch.cat([(plain[name] - start[name]).flatten() for name in plain]).norm()
    assert 0 < apart < 0.5 * moved


@pytest.mark.slow
def test_products_of_8_bits_have_the_error_of_their_format():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    module, x = ToyModule(width=32), torch.randn(64, 32)
    exact = module.online[0].expand(x)
    multiply_in_fp8(module, [ToyBlock])
    error = (module.online[0].expand(x) - exact).norm() / exact.norm()
    assert 0.005 < error < 0.05  # 3 bits of mantissa, twice: 2 ** -4 at most, a quarter of it on average
    assert type(module.target[0].expand) is type(module.online[0].expand) is not nn.Linear
    with pytest.raises(ValueError, match=r"fp8=true: .*16 divides"):
        multiply_in_fp8(ToyModule(width=6), [ToyBlock])


def test_products_of_8_bits_need_a_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"fp8=true: .*pip install 'hjepa-train\[fp8\]'"):
        multiply_in_fp8(ToyModule(), [ToyBlock])
