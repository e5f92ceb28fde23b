"""What a run trains: an H-JEPA, or a baseline around the same encoder; how it is built, kept and read again."""

from pathlib import Path

from hjepa_models import HJEPA, Encoder, load_pretrained, save_pretrained
from hjepa_pretrain.baselines import Baseline, build_baseline
from hjepa_pretrain.config import PretrainConfig

Model = HJEPA | Baseline


def build_model(config: PretrainConfig) -> Model:
    """Return the untrained model of a run, a function of its seed."""
    if config.baseline is None:
        return config.hjepa.build(seed=config.run.seed)
    return build_baseline(config.baseline, config.hjepa, seed=config.run.seed)


def feature_branch(model: Model) -> str:
    """Return the branch whose features a run is measured by: the target's where there is a moving average."""
    return "target" if model.ema_pairs() else "online"


def save_model(model: Model, folder: Path) -> None:
    """Write the weights that users take away: of an HJEPA all, of a baseline the encoder."""
    save_pretrained(model.encoder if isinstance(model, Baseline) else model, folder)


def load_run(folder: Path, config: PretrainConfig) -> Model:
    """Read what `save_model` wrote.

    Args:
        folder: of the run.
        config: of the run.

    Returns:
        The model; a baseline's head is untrained.

    Raises:
        ValueError: the folder holds no such weights.
    """
    if config.baseline is None:
        return load_pretrained(folder)
    model = build_baseline(config.baseline, config.hjepa, seed=config.run.seed)
    model.encoder = Encoder.from_pretrained(folder)
    return model
