"""Features on disk, by the weights, the data and the transform that they come from."""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hjepa_eval.extraction.features import FeatureName, FeatureSet
from hjepa_eval.extraction.gather import exchange, rank

logger = logging.getLogger(__name__)

FORMAT = "hjepa-eval-features-1"


@dataclass(kw_only=True, slots=True, frozen=True)
class CacheKey:
    """All that features depend on; another word anywhere is another file.

    Attributes:
        weights: weights_hash of the module.
        data: Hash of the samples and their order (files_hash of shards), with the number used.
        transform: Size, crop, normalisation, precision: whatever is done to a sample before the module sees it.
        features: Which blocks, levels, branches and poolings were asked for.
    """

    weights: str
    data: str
    transform: str
    features: str

    def digest(self) -> str:
        """SHA-256 of the four words and of the version of this package, whose pooling may change."""
        words = {**asdict(self), "version": version("hjepa-eval")}
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the module's printed form and of the name, type, shape and bytes of all its parameters and buffers.

    Buffers that no checkpoint holds (a normalisation, positions) count too.

    Args:
        module: Any module; its weights are copied to the CPU one by one.

    Returns:
        64 hexadecimal digits. Two modules that print alike with equal weights count as equal: what a printed form does
        not show (a scale that is no buffer) belongs into CacheKey.transform.
    """
    found = hashlib.sha256(repr(module).encode())
    for name, value in sorted((*module.named_parameters(), *module.named_buffers())):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(_bytes(value))
    return found.hexdigest()


def files_hash(paths: Iterable[Path | str], *, content: bool = True) -> str:
    """SHA-256 of files, in the order given.

    Args:
        paths: The files, e.g. the shards of a data set.
        content: Hash every byte; else names, sizes and times of change, which is quick and enough on one machine.

    Returns:
        64 hexadecimal digits; names of folders do not enter.
    """
    found = hashlib.sha256()
    for path in map(Path, paths):
        found.update(path.name.encode() + b"\0")
        if content:
            with path.open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            state = path.stat()
            found.update(f"{state.st_size} {state.st_mtime_ns}".encode())
    return found.hexdigest()


class FeatureCache:
    """A folder of safetensors files, each either whole or absent.

    A file is written aside and renamed, and holds a checksum of every tensor. A damaged one is named in a warning and
    made again.

    Args:
        folder: Where the files lie; made if need be.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, key: CacheKey) -> Path:
        """File of a key."""
        return self.folder / f"{key.digest()[:32]}.safetensors"

    def get(self, key: CacheKey, compute: Callable[[], dict[str, FeatureSet]]) -> dict[str, FeatureSet]:
        """Return the features of a key, computing and keeping them if they are not there.

        With several processes all call this; unless every one of them finds the file (on a disk that they share) all
        compute, and rank 0 writes. A write that fails is named in a warning: the features are returned all the same.

        Args:
            key: What they depend on.
            compute: Makes them, e.g. a call of extract with ``gather=True``.

        Returns:
            The features.

        Raises:
            OSError: Where the folder cannot be made; nothing is computed then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.read(key)
        if not all(exchange(found is not None)) or found is None:
            found = compute()
            if rank() == 0:
                try:
                    self.write(key, found)
                # safetensors refuses tensors that share their memory by a RuntimeError.
                except (OSError, SafetensorError, RuntimeError) as error:
                    why = " ".join(str(error).split())
                    logger.warning("%s: not written (%s); the features are not kept", self.path(key), why)
        return found

    def read(self, key: CacheKey) -> dict[str, FeatureSet] | None:
        """Return the features of a key, or None where there are none that are whole."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            return _load(path, key)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            logger.warning("%s: damaged (%s); the features are computed again", path, error)
            return None

    def write(self, key: CacheKey, sets: Mapping[str, FeatureSet]) -> Path:
        """Write features, whole or not at all.

        Args:
            key: What they depend on.
            sets: The features, all of the same samples.

        Returns:
            The file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"values/{number}": one.values.contiguous() for number, one in enumerate(sets.values())}
        labels = [one.labels for one in sets.values()]
        if not labels:
            raise ValueError("sets: there are none; give at least one")
        if any(not torch.equal(other, labels[0]) for other in labels[1:]):
            raise ValueError("sets: they are not of the same samples; write what came from one pass")
        tensors["labels"] = labels[0].contiguous()
        entries = [{"key": key_, "name": asdict(one.name)} for key_, one in sets.items()]
        content = {"key": asdict(key), "sets": entries, "crc32": {n: _checksum(t) for n, t in tensors.items()}}
        path = self.path(key)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata={"format": FORMAT, "content": json.dumps(content)})
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


def _load(path: Path, key: CacheKey) -> dict[str, FeatureSet]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format={metadata.get('format')}: expected {FORMAT}")
        content = json.loads(metadata["content"])
        if content["key"] != asdict(key):
            raise ValueError("it belongs to another key")
        tensors = {name: file.get_tensor(name) for name in content["crc32"]}
    for name, expected in content["crc32"].items():
        if _checksum(tensors[name]) != expected:
            raise ValueError(f"checksum of {name} does not match")
    return {
        entry["key"]: FeatureSet(
            values=tensors[f"values/{number}"], labels=tensors["labels"], name=FeatureName(**entry["name"])
        )
        for number, entry in enumerate(content["sets"])
    }


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type] # numpy arrays are buffers; Python 3.11 cannot say so
