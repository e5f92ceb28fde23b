"""Weights and config in a folder: `model.safetensors` and `config.json`, nothing that runs code."""

import dataclasses
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hjepa_models._validation import suggestion
from hjepa_models.hjepa import HJEPA, HJEPAConfig

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

C = TypeVar("C")


def config_from_dict(cls: type[C], data: dict[str, Any], where: str = "config") -> C:
    """Build a config dataclass, nested ones included, from plain values.

    Args:
        cls: the dataclass.
        data: its fields, as `dataclasses.asdict` gives them.
        where: path of the value, for errors.

    Returns:
        The validated config.

    Raises:
        ValueError: for a field that the dataclass does not have, or values that it refuses.
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
        values[key] = value if nested is None or value is None else config_from_dict(nested, value, f"{where}.{key}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}; allowed: the fields of {cls.__name__}; correct the values") from None


def _nested(hint: Any) -> type | None:  # noqa: ANN401
    """Return the dataclass of a field that holds one (or None), else nothing."""
    options = [option for option in get_args(hint) if option is not NoneType] if isinstance(hint, UnionType) else [hint]
    found = options[0]
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def save_pretrained(model: HJEPA, folder: str | Path) -> None:
    """Write a model to a folder, which is made where it is missing.

    Args:
        model: any HJEPA, both branches are kept.
        folder: receives `model.safetensors` and `config.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {"model": "HJEPA", "config": dataclasses.asdict(model.config)}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def load_pretrained(folder: str | Path, device: torch.device | str | None = None) -> HJEPA:
    """Read a model that `save_pretrained` wrote, in evaluation mode.

    Args:
        folder: holds `model.safetensors` and `config.json`.
        device: where the model goes; None means the CPU.

    Returns:
        The model.

    Raises:
        ValueError: for a file that is missing or damaged, or weights that do not fit the config; keys are listed.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; allowed: a folder written by save_pretrained; check the path")
    try:
        content = json.loads((folder / CONFIG_NAME).read_text())
        state = load_file(folder / WEIGHTS_NAME)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: damaged ({reason}); allowed: files written by save_pretrained; save again"
        ) from None
    if not isinstance(content, dict) or content.get("model") != "HJEPA":
        raise ValueError(f"{folder / CONFIG_NAME}: not the config of an HJEPA; allowed: model=HJEPA; check the path")
    model = config_from_dict(HJEPAConfig, content.get("config", {})).build()
    load_state(model, state, str(folder / WEIGHTS_NAME))
    return model.eval() if device is None else model.eval().to(device)


def load_state(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict whose keys and shapes must be exactly the model's, or refuse and list the differences."""
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & state.keys())
        if state[key].shape != wanted[key].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{source}: does not fit the model; missing: {_listed(missing)}; unexpected: {_listed(unexpected)}; "
            f"other shapes: {_listed(shapes)}; use the config that the weights were saved with"
        )
    model.load_state_dict(state)


def _listed(keys: list[str]) -> str:
    return ", ".join(keys) or "none"
