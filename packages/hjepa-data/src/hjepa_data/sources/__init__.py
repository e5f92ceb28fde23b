"""Sources: samples wherever they lie, as one numbered list."""

from hjepa_data.sources.base import Source
from hjepa_data.sources.files import FileSource
from hjepa_data.sources.folder import FolderSource
from hjepa_data.sources.hugging_face import HuggingFaceSource
from hjepa_data.sources.mixture import MixtureSource
from hjepa_data.sources.open import open_source
from hjepa_data.sources.torchvision import TorchvisionSource

__all__ = [
    "FileSource",
    "FolderSource",
    "HuggingFaceSource",
    "MixtureSource",
    "Source",
    "TorchvisionSource",
    "open_source",
]
