"""The tensors of a checkpoint in safetensors files, one a rank, that any number of ranks can read.

The format is the one of `torch.distributed.checkpoint.HuggingFaceStorageReader`, which reads these files too: a file's
header says under `DCP_SHARDING_INFO` where its part of each tensor begins. It is written here, in one pass that hashes
and lets other threads run: torch's writer makes a second copy of everything in memory, while the training waits, and
its planner sends pickles between ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hjepa_train.checkpoint.files import DamagedError, Written
from hjepa_train.checkpoint.parts import Box, Part, overlap, whole_shape
from hjepa_train.errors import CheckpointError
from hjepa_train.sharded import local, offsets

SUFFIX = ".safetensors"
_SHARDING = "DCP_SHARDING_INFO"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what the format cannot hold.

    Raises:
        CheckpointError: Where a tensor's dtype has no name in the format.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            kind, *allowed = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *_DTYPES))
            raise CheckpointError(
                f"{name}: {kind} cannot be saved; allowed: {', '.join(allowed)}; convert it, or register a buffer with "
                "persistent=False"
            )


def write_tensors(path: Path, parts: Mapping[str, Part]) -> Written:
    """Write parts of tensors to a new file, flush it to the disk and say what should stand there."""
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            _SHARDING: json.dumps({name: {"saved_offsets": part.offsets} for name, part in parts.items()}),
        }
    }
    position = 0
    for name, part in parts.items():
        end = position + part.values.nbytes
        shape = list(part.values.shape)
        header[name] = {"dtype": _DTYPES[part.values.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        contents = itertools.chain([len(text).to_bytes(8, "little"), text], (_bytes(p.values) for p in parts.values()))
        for content in contents:
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return Written(file.tell(), digest.hexdigest())


def _bytes(values: Tensor) -> bytes | memoryview:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Saved(NamedTuple):
    file: Path
    box: Box


class SavedTensors(Mapping[str, Tensor]):
    """The whole tensors that lie in parts in some files, read from the disk one at a time; nothing is unpickled.

    Args:
        paths: Files of all ranks.

    Raises:
        DamagedError: Where a file is no safetensors file, or the parts do not make whole tensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._parts: dict[str, list[_Saved]] = {}
        self._files: dict[Path, Any] = {}
        for path in paths:
            try:
                self._index(path)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise DamagedError(f"{path.name}: no file of a checkpoint ({type(error).__name__})") from error
        shapes = {name: whole_shape(part.box for part in parts) for name, parts in self._parts.items()}
        torn = sorted(name for name, shape in shapes.items() if shape is None)
        if torn:
            raise DamagedError(f"{len(torn)} tensors are not whole ({', '.join(torn[:3])})")
        self.shapes = {name: list(shape) for name, shape in shapes.items() if shape is not None}

    def _index(self, path: Path) -> None:
        file = self._files[path] = _open(path)
        metadata = file.metadata() or {}
        sharding = json.loads(metadata[_SHARDING]) if _SHARDING in metadata else {}
        for name in file.keys():  # noqa: SIM118 (no mapping)
            shape = tuple(file.get_slice(name).get_shape())
            begin = tuple(sharding[name]["saved_offsets"]) if sharding else (0,) * len(shape)
            self._parts.setdefault(name, []).append(_Saved(path, (begin, shape)))

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        if len(parts) == 1:
            tensor: Tensor = self._files[parts[0].file].get_tensor(name)
            return tensor
        first = self._files[parts[0].file].get_slice(name)[:0]
        out = torch.empty(self.shapes[name], dtype=first.dtype)
        self._read(name, out, (0,) * out.ndim)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def __len__(self) -> int:
        return len(self._parts)

    def copy_to(self, name: str, tensor: Tensor) -> None:
        """Fill a tensor, or this rank's part of one, with the values saved under a name; only those are read."""
        here = local(tensor)
        if here.numel():
            self._read(name, here, offsets(tensor))

    @torch.no_grad()
    def _read(self, name: str, out: Tensor, begin: tuple[int, ...]) -> None:
        for part in self._parts[name]:
            common = overlap((begin, tuple(out.shape)), part.box)
            if common is None:
                continue
            source = self._files[part.file].get_slice(name)
            values = source[_slices(common, part.box[0])] if out.ndim else self._files[part.file].get_tensor(name)
            out[_slices(common, begin)].copy_(values)


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(b - o, b - o + n) for b, n, o in zip(*box, origin, strict=True))


def _open(path: Path) -> Any:  # noqa: ANN401 (whether its methods are typed depends on the version)
    return safe_open(path, framework="pt", device="cpu")
