"""Weights and config in a folder: `model.safetensors` and `config.json`, nothing that runs code."""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hjepa_models._validation import coerce_choice, suggestion
from hjepa_models.initialization import construct

if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin

    from hjepa_models.hjepa import HJEPA

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)


def config_from_dict(cls: type[C], data: object, where: str = "config") -> C:
    """Build a config dataclass, nested ones included, from plain values; fields that are missing take their defaults.

    Args:
        cls: the dataclass.
        data: its fields, as `dataclasses.asdict` gives them.
        where: path of the value, for errors.

    Returns:
        The validated config.

    Raises:
        ValueError: for a field that the dataclass does not have, a value of another type than its field's, or values
            that the dataclass refuses.
    """
    assert dataclasses.is_dataclass(cls)
    if not isinstance(data, dict):
        raise ValueError(f"{where}={data!r}: not a mapping; allowed: the fields of {cls.__name__}; correct the file")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in hints:
            raise ValueError(
                f"{where}.{key}: no field of {cls.__name__}; allowed: {', '.join(hints)}{suggestion(key, hints)}"
            )
        nested = _nested(hints[key])
        if nested is not None and value is not None:
            values[key] = config_from_dict(nested, value, f"{where}.{key}")
        elif _fits(hints[key], value):
            values[key] = value
        else:
            kind = hints[key].__name__ if isinstance(hints[key], type) else hints[key]
            raise ValueError(f"{where}.{key}={value!r}: of another type; allowed: {kind}; correct the value")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}; allowed: the fields of {cls.__name__}; correct the values") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _fits(hint: Any, value: Any) -> bool:  # noqa: ANN401
    """Whether a plain value may stand in a field; choices by name and types that are no plain ones the class checks."""
    if isinstance(hint, UnionType):
        return any(_fits(option, value) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_fits(get_args(hint)[0], entry) for entry in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return not isinstance(hint, type) or issubclass(hint, StrEnum) or isinstance(value, hint)


def _nested(hint: Any) -> type | None:  # noqa: ANN401
    """Return the dataclass of a field that holds one (or None), else nothing."""
    options = [option for option in get_args(hint) if option is not NoneType] if isinstance(hint, UnionType) else [hint]
    found = options[0]
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a model to a folder, which is made where it is missing.

    Args:
        model: any HJEPA (both branches are kept) or Encoder: a module whose `config` is a dataclass.
        folder: receives `model.safetensors` and `config.json`, which names the class.

    Raises:
        ValueError: for weights that are no plain tensors, as those of a quantised or sharded model, or have no storage,
            a module without a config, or a folder that is a file.
    """
    folder, state = _writable(folder), plain_state(model)
    described = getattr(model, "config", None)
    if not dataclasses.is_dataclass(described):
        raise ValueError(
            f"model={type(model).__name__}: has no config to build it anew from; allowed: HJEPA, Encoder, or a module "
            "whose config is a dataclass; save its state_dict instead"
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.cpu().contiguous() for key, value in state.items()}
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {"model": type(model).__name__, "config": dataclasses.asdict(cast(Any, described))}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # safetensors leaves a file to its owner alone; who may read the one may read the other.
    (folder / WEIGHTS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model, without gradient, or refuse those that are no plain tensors with storage."""
    state: dict[str, Tensor] = {key: value.detach() for key, value in model.state_dict().items()}
    special = [key for key, value in state.items() if type(value) is not Tensor or value.is_meta]
    if special:
        first = state[special[0]]
        kind = "tensor without storage" if first.is_meta else type(first).__name__
        raise ValueError(
            f"{special[0]}: a {kind}, like {len(special)} weights of the model; allowed: plain tensors; "
            "take the model before it is quantised, or gather or fill it first"
        )
    return state


def _writable(folder: str | Path) -> Path:
    """Return a folder that can be made where it is missing, or refuse."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; allowed: a folder, made where it is missing; give another path")
    return folder


def load_pretrained(
    folder: str | Path,
    device: torch.device | str | None = None,
    *,
    allow: Sequence[str] = (),
    image_size: tuple[int, ...] | None = None,
    positions: str = "interpolate",
) -> "HJEPA":
    """Read an HJEPA that `save_pretrained` wrote, in evaluation mode and float32, in whatever dtype it was saved.

    Args:
        folder: holds `model.safetensors` and `config.json`.
        device: where the model goes; None means the CPU.
        allow: patterns (`fnmatch`: `predictor.*`) of keys that may differ, see `load_state`.
        image_size: pixels per axis that the model is made for; None means the size that it was saved with.
        positions: what positions do at another size, `interpolate` or `extend`, see `at_resolution`; `extend` needs an
            `image_size`.

    Returns:
        The model.

    Raises:
        ValueError: for a file that is missing or damaged, weights that do not fit the config (keys are listed), a size
            that the patches cannot tile, or positions that would change nothing.
    """
    from hjepa_models.hjepa import HJEPA
    from hjepa_models.resolution import PositionResize, at_resolution

    if coerce_choice(PositionResize, "positions", positions) is PositionResize.extend and image_size is None:
        raise ValueError(
            "positions=extend: image_size=None keeps the size, and with it all positions; allowed: with an image_size; "
            "give one, or leave positions out"
        )
    model = load_model(HJEPA, folder, device, allow=allow)
    return model if image_size is None else at_resolution(model, image_size, positions)


def load_model(
    cls: type[M],
    folder: str | Path,
    device: torch.device | str | None = None,
    *,
    allow: Sequence[str] = (),
) -> M:
    """Read a model of class `cls`, as `load_pretrained` reads an HJEPA.

    Args:
        cls: `HJEPA`, `Encoder`, or another module that is made from one argument `config` and has `init_weights`.
        folder: holds `model.safetensors` and `config.json`, written by `save_pretrained` from a model of that class.
        device: where the model goes; None means the CPU.
        allow: patterns of keys that may differ, see `load_state`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: for a file that is missing or damaged, the config of another class, or weights that do not fit.
    """
    folder = Path(folder)
    config = read_config(cls, folder)
    state = _read(folder, WEIGHTS_NAME, load_file)
    make = cast(Callable[[Any], M], cls)
    model = construct(lambda: make(config), 0, None)
    load_state(model, state, str(folder / WEIGHTS_NAME), allow)
    return model.eval() if device is None else model.eval().to(device)


def read_config(cls: type[nn.Module], folder: Path) -> Any:  # noqa: ANN401
    """Return the config that a folder keeps for a model of class `cls`.

    Raises:
        ValueError: for a file that is missing or damaged, or the config of another class.
    """
    content = _read(folder, CONFIG_NAME, lambda path: json.loads(path.read_text(encoding="utf-8")))
    name = cls.__name__
    content = content if isinstance(content, dict) else {}
    if content.get("model") != name:
        raise ValueError(
            f"{folder / CONFIG_NAME}: model={content.get('model')!r}: not a config of {name}; allowed: model={name!r}; "
            "check the path, or load it with the class that it names"
        )
    hint = get_type_hints(cls.__init__)["config"]
    return config_from_dict(hint, content.get("config"), f"{folder / CONFIG_NAME}: config")


def _read(folder: Path, name: str, read: Callable[[Path], C]) -> C:
    """Return what `read` makes of a file, or refuse it in one line."""
    path = folder / name
    if not path.is_file():
        what = f"no {name}" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {what}; allowed: a folder written by save_pretrained; check the path")
    try:
        return read(path)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged ({reason}); allowed: files written by save_pretrained; save again") from None


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str, allow: Sequence[str] = ()) -> None:
    """Load a state dict whose keys and shapes must be exactly the model's, or refuse and list the differences.

    A difference is let through only where a pattern names its key: a missing key then keeps its value in the model,
    and so does one of another shape; an unexpected one is dropped. What was let through is logged in one line.

    Args:
        model: receives the weights.
        state: the weights.
        source: where they come from, for messages.
        allow: patterns (`fnmatch`: `predictor.*`, `*.bias`) of keys that may differ.

    Raises:
        ValueError: for a difference that no pattern names, or a pattern that names no key at all.
    """
    wanted = model.state_dict()
    patterns = (allow,) if isinstance(allow, str) else tuple(allow)
    _check_patterns(patterns, sorted(wanted.keys() | state.keys()), source)
    differences = {
        "missing": {key: key for key in sorted(wanted.keys() - state.keys())},
        "unexpected": {key: key for key in sorted(state.keys() - wanted.keys())},
        "other shapes": {
            key: f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
            for key in sorted(wanted.keys() & state.keys())
            if state[key].shape != wanted[key].shape
        },
    }
    refused, allowed = {}, {}
    for kind, found in differences.items():
        refused[kind] = [text for key, text in found.items() if not _named(key, patterns)]
        allowed[kind] = [text for key, text in found.items() if _named(key, patterns)]
    if any(refused.values()):
        raise ValueError(
            f"{source}: does not fit the model; {_listed(refused)}; "
            "use the config that the weights were saved with, or name the keys in allow"
        )
    if any(allowed.values()):
        logger.warning("%s: differences that were allowed; %s", source, _listed(allowed))
    differing = set().union(*differences.values())
    model.load_state_dict({key: wanted[key] if key in differing else state[key] for key in wanted})


def _named(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _check_patterns(patterns: tuple[str, ...], keys: list[str], source: str) -> None:
    """Refuse the first pattern that no key matches: it is probably misspelt."""
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in keys):
            heads = sorted({key.split(".")[0] for key in keys})
            near = suggestion(pattern.split(".")[0], heads)
            raise ValueError(
                f"allow={pattern!r}: matches no key of the model or of {source}; "
                f"allowed: patterns of keys that begin with {', '.join(heads)}; correct it or leave it out{near}"
            )


def _listed(kinds: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{kind}: {', '.join(found) or 'none'}" for kind, found in kinds.items())


_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

_CARD = """---
{{ card_data }}
---

# {{ model_class }}

A hierarchical joint-embedding predictive model. `config.json` describes it, `model.safetensors` holds its weights.

```python
from hjepa_models import {{ model_class }}

model = {{ model_class }}.from_pretrained("path/to/this/folder")
```
"""


class PretrainedMixin:
    """Gives a module what `huggingface_hub.PyTorchModelHubMixin` gives, over the files of `save_pretrained`.

    The module is made from one argument `config`, a dataclass, keeps it as `self.config`, and has `init_weights`.
    huggingface_hub does the work but is no base class: its import takes a quarter of a second, which is paid at the
    first call instead of by everyone who imports this package.
    """

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `model.safetensors`, `config.json` and, where there is none, a model card `README.md` to a folder.

        Args:
            save_directory: is made where it is missing.

        Raises:
            ValueError: as the function `save_pretrained`.
        """
        _hub()(self).save_pretrained(_writable(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Weights and config of an hjepa model",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub.

        Args:
            repo_id: `OWNER/NAME`; is made where it is missing.
            commit_message: of the upload.
            private: whether a new repository is private; None follows the owner's setting.
            token: of the owner; None takes the one that `hf auth login` stored.
            branch: receives the upload; None means the main one.

        Returns:
            The address of the commit.
        """
        url: str = _hub()(self).push_to_hub(
            repo_id, commit_message=commit_message, private=private, token=token, branch=branch
        )
        return url

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        device: torch.device | str | None = None,
        *,
        allow: Sequence[str] = (),
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read a model from a folder, in evaluation mode; what is no folder is looked up on the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or `OWNER/NAME` on the Hub.
            device: where the model goes; None means the CPU.
            allow: patterns (`fnmatch`: `predictor.*`) of keys that may differ, see `load_state`.
            revision: branch, tag or commit on the Hub; None means the main branch.
            cache_dir: where downloads are kept; None means the Hub's own cache.
            token: for private repositories; None takes the one that `hf auth login` stored.
            local_files_only: use downloads that are there already, and never the network.

        Returns:
            The model.

        Raises:
            ValueError: for a path that leads nowhere, the config of another class, damaged files, or weights that do
                not fit; each in one line.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.exists() and _REPOSITORY.fullmatch(str(pretrained_model_name_or_path)):
            folder = _download(
                str(pretrained_model_name_or_path),
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        owner = cast(type[nn.Module], cls)
        read_config(owner, folder)  # The Hub's mixin reads the file too, and meets damage with a traceback.
        load = functools.partial(load_model, owner, device=device, allow=allow)
        loaded: Self = cast(Any, _hub().from_pretrained(folder, load=load)).wrapped
        return loaded


def _download(name: str, **options: Any) -> Path:  # noqa: ANN401
    """Return the local folder of a repository on the Hub, fetched where it has to be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **options))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name}: no such folder, and not to be had from the Hub ({reason}); "
            "allowed: a folder written by save_pretrained, or OWNER/NAME; check the path"
        ) from None


@functools.cache
def _hub() -> type["PyTorchModelHubMixin"]:
    """Return the Hub's mixin over our files, around a module of any class."""
    from huggingface_hub import ModelCard, PyTorchModelHubMixin

    class HubModel(
        PyTorchModelHubMixin, library_name="hjepa-models", tags=["hjepa", "jepa"], model_card_template=_CARD
    ):
        def __init__(self, wrapped: nn.Module) -> None:
            self.wrapped = wrapped

        def _save_pretrained(self, save_directory: Path) -> None:
            save_pretrained(self.wrapped, save_directory)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> "HubModel":  # noqa: ANN401
            return cls(options["load"](model_id))

        def generate_model_card(self, *_: object, **__: object) -> ModelCard:
            return super().generate_model_card(model_class=type(self.wrapped).__name__)

    return HubModel
