"""Where a run comes from: versions, revision, machine, command."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

_PACKAGES = (
    "hjepa-pretrain",
    "hjepa-models",
    "hjepa-data",
    "hjepa-train",
    "hjepa-eval",
    "torch",
    "torchvision",
    "timm",
)


def provenance(words: list[str], device: torch.device) -> dict[str, object]:
    """Returns what a reader needs to repeat the run: command, versions, git revision, machine, time."""
    cuda = device.type == "cuda"
    return {
        "command": shlex.join(["hjepa-pretrain", *words]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({torch.get_num_threads()} threads)",
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git": git_revision(),
        "executable": Path(sys.executable).name,
    }


def git_revision() -> str:
    """Returns the revision of the checkout that this code runs from, `-dirty` if changed, or "not a checkout"."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "not a checkout"
    return found.stdout.strip() or "not a checkout"
