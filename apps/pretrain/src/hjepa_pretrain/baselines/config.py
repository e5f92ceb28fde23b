"""Which baseline a recipe trains, if it trains one."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from hjepa_models import HJEPAConfig
from hjepa_models.initialization import construct
from hjepa_pretrain.baselines.base import Baseline


class BaselineKind(StrEnum):
    """The method."""

    mae = "mae"
    supervised = "supervised"


@dataclass(kw_only=True, slots=True)
class BaselineConfig:
    """A method in place of the H-JEPA; `hjepa.encoder` and `hjepa.predictor` (MAE's decoder) describe its parts."""

    kind: BaselineKind = BaselineKind.mae
    """`mae` (pixels of hidden patches) or `supervised` (class labels)."""
    normalize_pixels: bool = True
    """MAE: give each patch mean 0 and deviation 1 before it is predicted."""
    num_classes: int | None = None
    """Supervised: classes; null counts those of `data.train`."""
    label_smoothing: float = 0.1
    """Supervised: share of the target that goes to all classes alike."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        self.kind = BaselineKind(self.kind)
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"baseline.num_classes={self.num_classes}: nothing to tell apart; allowed: 2 and more")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"baseline.label_smoothing={self.label_smoothing}: no share; allowed: 0 up to below 1")


def build_baseline(config: BaselineConfig, hjepa: HJEPAConfig, *, seed: int) -> Baseline:
    """Build a baseline around the encoder that `hjepa` describes; its weights are a function of the seed."""
    from hjepa_pretrain.baselines.mae import MAE
    from hjepa_pretrain.baselines.supervised import Supervised

    kinds: dict[BaselineKind, Callable[[BaselineConfig, HJEPAConfig], Baseline]]
    kinds = {BaselineKind.mae: MAE, BaselineKind.supervised: Supervised}
    return construct(lambda: kinds[config.kind](config, hjepa), seed, None)
