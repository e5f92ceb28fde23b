"""From a module, a timm name or a folder to a module; and from a model with a hierarchy to a feature function."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from hjepa_eval.extraction.features import FeatureName


class FolderLoader(Protocol):
    """Builds a module from a folder or checkpoint; the app that knows the format gives one."""

    def __call__(self, folder: Path) -> nn.Module:
        """Return the module in this folder."""


class HierarchicalModel(Protocol):
    """A model that gives all its levels at once."""

    def all_features(self, images: Tensor, pool: str, branch: str) -> Mapping[Any, Tensor]:
        """Return tokens [B, N, D] by level under the pooling "none"; a level of the whole image may give [B, D]."""


def open_encoder(
    source: nn.Module | str | Path, *, load_folder: FolderLoader | None = None, pretrained: bool = False
) -> nn.Module:
    """Return the module that a user means.

    Args:
        source: A module; the folder or checkpoint of one (a path that exists); or the name of a timm model, which comes
            without its classifier.
        load_folder: Opens folders and checkpoints.
        pretrained: Whether a timm model gets its published weights (a download).

    Returns:
        The module.

    Raises:
        ValueError: Where the name is no path and no timm model, or a path comes without a loader.
        ImportError: Where a timm name is given and timm is not installed.
    """
    if isinstance(source, nn.Module):
        return source
    path = Path(source)
    if path.exists():
        if load_folder is None:
            raise ValueError(f"source={source}: a folder needs load_folder, e.g. hjepa_models.load_pretrained")
        return load_folder(path)
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"source={source}: no such path, and timm is not installed for it to be the name of a model; "
            "pip install timm, or correct the path"
        ) from error
    if isinstance(source, Path) or not timm.is_model(source):
        raise ValueError(f"source={source}: neither a path nor a timm model; see timm.list_models() for names")
    try:
        model: nn.Module = timm.create_model(source, pretrained=pretrained, num_classes=0)
    except RuntimeError as error:
        raise ValueError(f"source={source}: timm refuses it: {error}; see timm.list_pretrained() for names") from error
    return model


def level_features(
    model: HierarchicalModel, *, branches: Sequence[str] | None = None, poolings: Sequence[str] = ("mean",)
) -> Callable[[Tensor], dict[FeatureName, Tensor]]:
    """A feature function for ``extract``: every level of a model with a hierarchy, by branch and pooling.

    Args:
        model: What has ``all_features``, which is called once for each branch.
        branches: Encoder branches; None: "target", but "online" of a model whose ``ema_pairs()`` are none.
        poolings: "mean" or "flatten" of the tokens. What is a vector already stays as it is, under the pooling "none".

    Returns:
        The function; its ``module`` is the model, so that ``extract`` puts it in eval mode.

    Raises:
        ValueError: Where there is no such pooling.
    """
    pools: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda x: x.mean(dim=1), "flatten": lambda x: x.flatten(1)}
    if not poolings or not set(poolings) <= set(pools):
        raise ValueError(f"poolings={tuple(poolings)}: none, or unknown; allowed: {', '.join(pools)}")

    if branches is None:
        averaged = getattr(model, "ema_pairs", None)
        branches = ("target",) if averaged is None or averaged() else ("online",)

    def features(images: Tensor) -> dict[FeatureName, Tensor]:
        found = {}
        for branch in branches:
            for level, tokens in model.all_features(images, "none", branch).items():
                for pooling in ("none",) if tokens.ndim == 2 else poolings:
                    name = FeatureName(branch=branch, level=str(level), pooling=pooling)
                    found[name] = tokens if tokens.ndim == 2 else pools[pooling](tokens)
        return found

    features.module = model  # type: ignore[attr-defined]
    return features
