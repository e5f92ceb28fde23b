"""The features of a model as a graph that runs without this package: a torch.export program or an ONNX file."""

import copy
import warnings
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

from hjepa_models._validation import check_axes, coerce_choice
from hjepa_models.config import Branch, FeaturePool
from hjepa_models.hjepa import HJEPA
from hjepa_models.layers.attention import Attention, AttentionBackend

INPUT_NAME = "images"


def output_names(model: HJEPA, level: int | str | None) -> tuple[str, ...]:
    """Return the names of what an exported graph gives, in order.

    One level gives "features"; all of them (`level=None`) give "encoder", "level_0", "level_1", ... and, where the
    model has them, "map0", ..., "pooled", "all" and "global".
    """
    if level is not None:
        return ("features",)
    return tuple(f"level_{each}" if isinstance(each, int) else each for each in model.feature_levels)


def export_features(
    model: HJEPA,
    level: int | str | None = "encoder",
    pool: FeaturePool | str = FeaturePool.mean,
    branch: Branch | str = Branch.target,
    *,
    image_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ExportedProgram:
    r"""Export `features` (or `all_features`) for any batch size, in evaluation mode.

    With a mean $\mu$ and a deviation $\sigma$ per channel the graph takes pixels in [0, 1] and computes
    $f((x - \mu) / \sigma)$; without them it takes normalised pixels, as `features` does.

    The program owns copies of the weights that it uses and needs no gradient; the model is left as it was, its modes
    included. `torch.export.save` and `torch.export.load` write and read it, `program.module()` runs it. Its one input
    is "images", [B, C, *S].

    Args:
        model: any HJEPA; one on a GPU is copied to the CPU to be traced, and the program is moved to that GPU.
        level: a level of `features`; None means all of them, as a tuple in the order of `output_names`.
        pool: `mean`, `none` or `flatten`.
        branch: `target` or `online`.
        image_size: pixels per axis; None means the configured ones. The size is fixed in the graph.
        mean: mean of each channel, for pixels in [0, 1]; goes with `std`.
        std: deviation of each channel.

    Returns:
        The program.

    Raises:
        ValueError: for a level that the model does not have, an image size that the patches cannot tile, or statistics
            that do not fit the channels.
    """
    program = _trace(model, level, pool, branch, image_size, mean, std)
    device = next(model.parameters()).device
    return program if device.type == "cpu" else _move(program, device)


def export_onnx(
    model: HJEPA,
    path: str | Path,
    level: int | str | None = None,
    pool: FeaturePool | str = FeaturePool.mean,
    branch: Branch | str = Branch.target,
    *,
    image_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    opset: int | None = None,
) -> None:
    """Write `features` (or `all_features`) to an ONNX file, for any batch size; needs the extra `onnx`.

    The input is "images", [batch, C, *S]; the outputs are named by `output_names`. The metadata of the file tell level,
    pool, branch, and the mean and deviation that the graph applies.

    Args:
        model: any HJEPA, on any device.
        path: the file; weights above 2 GB go to a second one beside it, named `<path>.data`.
        level: a level of `features`; None means all of them, the images being encoded once.
        pool: `mean`, `none` or `flatten`.
        branch: `target` or `online`.
        image_size: pixels per axis; None means the configured ones.
        mean: mean of each channel, for pixels in [0, 1]; goes with `std`.
        std: deviation of each channel.
        opset: version of the ONNX operators; None takes the one that torch recommends.

    Raises:
        ValueError: as `export_features`, for a folder that does not exist or an opset that the graph cannot be
            converted to, or where onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ValueError(
                f"package={package!r}: not installed, ONNX export needs it; allowed: the extra `onnx`; "
                "pip install 'hjepa-models[onnx]'"
            )
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path={path}: its folder does not exist; allowed: a file in one that does; make the folder")
    names = output_names(model, level)
    program = _trace(model, level, pool, branch, image_size, mean, std)
    with warnings.catch_warnings():
        # Some releases of torch warn of classes of their own.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        exported = torch.onnx.export(
            program,
            (),
            input_names=[INPUT_NAME],
            output_names=names,
            opset_version=opset,
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    written = exported.model.opset_imports[""]
    if opset is not None and written != opset:
        raise ValueError(
            f"opset={opset}: the graph could not be converted from {written}; allowed: e.g. {written}; "
            "leave opset out, or give one nearer to it"
        )
    exported.model.producer_name = "hjepa-models"
    exported.model.metadata_props.update(
        {
            "level": "all" if level is None else str(level),
            "pool": FeaturePool(pool).value,
            "branch": Branch(branch).value,
            "mean": "" if mean is None else ", ".join(map(str, mean)),
            "std": "" if std is None else ", ".join(map(str, std)),
        }
    )
    exported.save(path)


def _trace(
    model: HJEPA,
    level: int | str | None,
    pool: FeaturePool | str,
    branch: Branch | str,
    image_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> ExportedProgram:
    """Return the program that `export_features` gives, on a CPU."""
    pool, branch = coerce_choice(FeaturePool, "pool", pool), coerce_choice(Branch, "branch", branch)
    if next(model.parameters()).device.type != "cpu":
        # Convolutions of a GPU bound the batch size of a graph that is traced there.
        model = copy.deepcopy(model).cpu()
    graph = _Features(model, level, pool, branch, _statistics(model, mean, std))
    shape = _example_shape(model, image_size)
    # Two images: a batch of one would be taken for a constant.
    example = torch.zeros(2, *shape, dtype=next(model.parameters()).dtype)
    # Gradients are off around the trace, so that switching them off inside leaves no operator in the graph.
    with _evaluation(model), torch.no_grad():
        graph(example)  # Says in one line what does not fit; the tracer would bury it.
        # Strict: the other tracer makes constants of lengths that are asked for by `len`.
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=True)
    _own_weights(program)
    return program


def _move(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    """Move a program off a CPU, the regions that autocast must not touch included, which PyTorch's pass forgets."""
    program = move_to_device_pass(program, device)
    for node in program.graph.nodes:
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            node.update_arg(0, device.type)
    return program


class _Features(nn.Module):
    """The call that is traced."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        model: HJEPA,
        level: int | str | None,
        pool: FeaturePool,
        branch: Branch,
        statistics: tuple[Tensor, Tensor] | None,
    ) -> None:
        super().__init__()
        self.model, self.level, self.pool, self.branch = model, level, pool, branch
        mean, std = (None, None) if statistics is None else statistics
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.mean is not None and self.std is not None:
            images = (images - self.mean) / self.std
        if self.level is None:
            return tuple(self.model.all_features(images, self.pool, self.branch).values())
        return self.model.features(images, self.level, self.pool, self.branch)


def _statistics(
    model: HJEPA, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor] | None:
    """Return mean and deviation, shaped to fit images, or None without them."""
    if mean is None and std is None:
        return None
    channels, axes = model.config.encoder.in_channels, len(model.config.encoder.patch_size)
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sized) or len(values) != channels:
            raise ValueError(f"{name}={values}: does not fit; allowed: {channels} numbers, one per channel; give both")
    assert mean is not None
    assert std is not None
    if not all(value > 0 for value in std):
        raise ValueError(f"std={tuple(std)}: divides by 0 or less; allowed: > 0; correct it")
    like = next(model.parameters())
    shape = (1, channels, *(1,) * axes)
    return (like.new_tensor(mean).reshape(shape), like.new_tensor(std).reshape(shape))


def _example_shape(model: HJEPA, image_size: Sequence[int] | None) -> tuple[int, ...]:
    config = model.config.encoder
    return (config.in_channels, *(config.image_size if image_size is None else check_axes("image_size", image_size)))


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and plain operators inside; afterwards every module is as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    fused = [one for one in model.modules() if isinstance(one, Attention) and one.backend is AttentionBackend.flex]
    model.eval()
    # FlexAttention's operator is PyTorch's own; the others compute the same.
    for attention in fused:
        attention.backend = AttentionBackend.sdpa
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for attention in fused:
            attention.backend = AttentionBackend.flex


def _own_weights(program: ExportedProgram) -> None:
    """Drop the weights that the graph does not use, and copy the rest: training the model must not change a program."""
    used = {*program.graph_signature.parameters, *program.graph_signature.buffers}
    state = program.state_dict
    for key, value in list(state.items()):
        if key not in used:
            del state[key]
            continue
        copied = value.detach().clone()
        state[key] = nn.Parameter(copied, requires_grad=False) if isinstance(value, nn.Parameter) else copied
