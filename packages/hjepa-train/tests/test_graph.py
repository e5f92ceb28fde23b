"""Blocks that run again in the backward pass, and compiled steps, train like plain ones."""

import pytest
import torch
from torch import nn

from hjepa_train import ParallelConfig, Trainer, TrainerConfig
from hjepa_train.graph import compile_module, recompute_activations
from hjepa_train.testing import ArithmeticStream, ToyBlock, ToyModule


class CompiledToy(ToyModule):
    """Knows what of its step can be compiled."""

    options = None

    def compile_step(self, **options):
        self.options = options
        self.online.compile(**options)


def weights(device, module, **fields):
    parallel = ParallelConfig(device=device.type)
    config = TrainerConfig(steps=4, precision="fp32", parallel=parallel, **fields)
    trainer = Trainer(module, ArithmeticStream(), config, blocks=[ToyBlock])
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


def test_recomputed_blocks_keep_less(device):
    kept = []
    for names in ((), ("ToyBlock",)):
        module = ToyModule(width=32).to(device)
        recompute_activations(module, names)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            module(next(iter(ArithmeticStream(width=32))).to(device), 0)
        kept.append(sum(sizes))
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
