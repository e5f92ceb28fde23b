"""What a run trains: an H-JEPA, or a baseline around the same encoder; how it is built, kept and read again."""

import shlex
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


def kept_part(model: Model) -> HJEPA | Encoder:
    """Return what users take away: of an HJEPA all, of a baseline the encoder."""
    return model.encoder if isinstance(model, Baseline) else model


def save_model(model: Model, folder: Path) -> None:
    """Write the weights of the part that is kept."""
    save_pretrained(kept_part(model), folder)


def command(folder: str | Path) -> str:
    """Return what goes on with the run of a folder, to be pasted into a shell."""
    return shlex.join(["hjepa-pretrain", f"run.dir={folder}"])


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
    try:
        if config.baseline is None:
            return load_pretrained(folder)
        model = build_baseline(config.baseline, config.hjepa, seed=config.run.seed)
        model.encoder = Encoder.from_pretrained(folder)
    except ValueError as error:
        again = f"remove what is damaged; what is missing is written again by {command(folder)}"
        raise ValueError(f"{error}; {again}") from error
    return model
