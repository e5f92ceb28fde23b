"""Video JEPA on the same tokens: tubelets, clips, tube masks."""

from hjepa_video.clip import ClipError, ClipInfo, ClipProblem, ShortClip, clip_start, probe_clip, read_clip
from hjepa_video.masks import TubeMaskConfig, TubeMasks, long_range, short_range
from hjepa_video.model import VideoHJEPA, VideoHJEPAConfig, VideoOutput, video_config
from hjepa_video.stream import ClipStream, ClipStreamConfig, list_clips
from hjepa_video.transforms import center_view, random_view

__all__ = [
    "ClipError",
    "ClipInfo",
    "ClipProblem",
    "ClipStream",
    "ClipStreamConfig",
    "ShortClip",
    "TubeMaskConfig",
    "TubeMasks",
    "VideoHJEPA",
    "VideoHJEPAConfig",
    "VideoOutput",
    "center_view",
    "clip_start",
    "list_clips",
    "long_range",
    "probe_clip",
    "random_view",
    "read_clip",
    "short_range",
    "video_config",
]
