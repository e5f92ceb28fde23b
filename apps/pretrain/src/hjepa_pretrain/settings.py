"""From command-line words to a typed configuration, and back to a file that explains a run.

hydra composes `conf/`; omegaconf checks types against `PretrainConfig`; the dataclasses check values. Whatever is wrong
leaves here as a `SettingsError` of one line.
"""

import difflib
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hjepa_data.masks import MASK_LAWS
from hjepa_models import ContrastScope, Objective, Prediction, encoder_config
from hjepa_models.config import WITHOUT_EMA
from hjepa_models.encoder import tokens_per_axis
from hjepa_models.pooling import pooling_grid
from hjepa_pretrain.baselines import BaselineKind
from hjepa_pretrain.config import PretrainConfig
from hjepa_train import CollapsePolicy, LoggerKind, OptimizerKind, ParallelKind, ScheduleUnit
from hjepa_train.checkpoint.files import replace_text

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
# What a run may change when it goes on; everything else would make it another run. Data may lie elsewhere: the stream
# refuses other samples.
CHANGEABLE = (
    "run.dir", "run.steps", "run.train_time", "run.time_limit", "run.device", "run.threads", "parallel", "data.train",
    "data.eval", "data.cache", "data.workers", "data.decode", "data.max_skipped_fraction", "data.unreadable",
    "checkpoint.", "eval.", "monitor.", "profile", "profiler.", "trainer.log_every",
    "trainer.learning_rate.", "trainer.weight_decay.", "trainer.precision", "trainer.guard.", "trainer.check_every",
    "trainer.accumulate", "trainer.recompute", "trainer.compile", "trainer.fp8", "trainer.parallel.fsdp.",
    "loggers", "logger.", "early_stop", "plan.",
)  # fmt: skip
DERIVED = {
    "trainer.steps": "run.steps",
    "trainer.samples_per_step": "data.batch_size",
    "trainer.samples_per_epoch": "data.train",
    "trainer.parallel.kind": "parallel",
    "trainer.parallel.device": "run.device",
    "hjepa.level_weights.ramp_steps": "run.steps",
    "hjepa.patch_schedule.total_steps": "run.steps",
    "hjepa.encoder.image_size": "data.image_size",
    "masks.grid": "data.image_size",
    "mask_law": "masks",
}
# What a dry run without a model compares.
PLANNED = ("vit_large_patch16", "vit_huge_patch14", "vit_giant_patch14")
_PATHS = ("run.dir", "data.train", "data.eval", "data.cache", "plan.dir", "hydra.sweep.dir")
_GROUPS = ("recipe", "preset", "masks")
# What omegaconf says where a field of a part that is null is set.
_NULL_PART = "Unexpected type for root: NoneType"
# What is allowed, by what omegaconf says of a value of another type.
_WANTED = {
    "to Integer": "; allowed: a whole number in digits, as in 1000",
    "to Float": "; allowed: a number, as in 0.001 or 1e-3",
    "valid bool": "; allowed: true or false",
    "is not a ListConfig": "; allowed: a list in brackets, as in [1,2]",
    "is not a subclass of": "; allowed: one of the fields of this part, as in PART.FIELD=VALUE; --settings lists them",
    "is not Optional": ": null means nothing here; give a value, or leave it out for the default",
}
# What the name of a model says about its encoder.
_NAMED = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


class SettingsError(ValueError):
    """Wrong words on the command line or in a stored configuration."""


def load(words: Sequence[str], *, steps: int | None = None, quiet: bool = False) -> tuple[PretrainConfig, DictConfig]:
    """Returns the typed configuration and its plain form for the overrides in `words`.

    Without `data.train` the demo preset is taken. With a `run.dir` that already holds a run, that run's own
    configuration is the base, and only what may change between two sittings (`CHANGEABLE`) can differ.

    Args:
        words: of the command line.
        steps: in place of `run.steps`, where they follow from `run.train_time`.
        quiet: leave out what has been said of these words before.

    Raises:
        SettingsError: an unknown key, a value of the wrong type or range, or a change that a resumed run cannot take.
    """
    overrides = _parse(words)
    given = _given(overrides)
    _check(given)
    stored = _stored(given)
    try:
        plain = _fresh(words, given) if stored is None else _amend(stored, overrides)
        if steps is not None:
            plain.run.steps = steps
        # How long the warm-up may be is known with the steps.
        awaited = stored is None and steps is None and plain.run.train_time is not None
        if "parallel" not in given:
            _fit_world(plain)
        _derive(plain)
        if stored is None and plain.plan.dry and not given.keys() & {"model", "plan.models"}:
            plain.plan.models = list(PLANNED)
        warmup = int(plain.trainer.learning_rate.warmup_steps)
        if stored is None and not awaited and "trainer.learning_rate.warmup_steps" not in given:
            _shorten_warmup(plain)
        config = OmegaConf.to_object(plain)
    except (OmegaConfBaseException, ValueError, AssertionError) as error:
        raise SettingsError(in_full(one_line(error), words)) from error
    if not isinstance(config, PretrainConfig):
        raise SettingsError(f"the configuration is a {type(config).__name__}, not a PretrainConfig; check conf/")
    # A configuration that is refused gets the one line that says why.
    if not quiet:
        now = config.trainer.learning_rate.warmup_steps
        if now != warmup:
            text = "trainer.learning_rate.warmup_steps=%d shortened to %d, a fifth of run.steps=%d"
            logger.info(text, warmup, now, config.run.steps)
        if steps is None:
            _name_idle(plain, given)
            _name_lonely(config)
    return config, plain


def register() -> None:
    """Tells hydra the types of `conf/`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=PretrainConfig)
    for name, law in MASK_LAWS.items():
        store.store(group="masks", name=name, package="_global_", node={"mask_law": name, "masks": law})


def save(plain: DictConfig, sittings: list[dict[str, Any]], folder: Path) -> None:
    """Writes `config.yaml`: the resolved configuration, and where each sitting came from under `provenance`."""
    content = OmegaConf.to_container(plain, resolve=True, enum_to_str=True)
    text = yaml.safe_dump({**content, "provenance": sittings}, sort_keys=False)  # type: ignore[dict-item]
    replace_text(folder / CONFIG_FILE, text)


def read_provenance(folder: Path) -> list[dict[str, Any]]:
    """Returns where the sittings of a stored run came from; none where there is no run."""
    path = folder / CONFIG_FILE
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return list(content.get("provenance", []))


def holds_run(folder: str | Path | None) -> bool:
    """Returns whether a folder holds a run that has begun."""
    return folder is not None and (Path(folder) / CONFIG_FILE).is_file()


def plain_keys() -> list[str]:
    """Returns every key that can be set, dotted, those of parts that are off by default among them."""
    tree = OmegaConf.structured(PretrainConfig)
    for part, kind in _optional_parts(tree).items():
        OmegaConf.update(tree, part, OmegaConf.structured(kind), merge=False)
    masks = {f"masks.{part.name}" for law in MASK_LAWS.values() for part in fields(law)}
    return sorted(masks.union(_dotted(OmegaConf.to_container(tree, enum_to_str=True))))


def _given(overrides: Sequence[Override]) -> dict[str, Any]:
    """Return the values that overrides set, by dotted names."""
    return {key: value for one in overrides for key, value in _set(one.key_or_group, one.value())}


def _parse(words: Sequence[str]) -> list[Override]:
    parser, overrides = OverridesParser.create(), []
    for word in words:
        try:
            overrides.append(parser.parse_override(quoted(word)))
        except HydraException as error:
            raise SettingsError(
                f"{word!r} is not a setting; write key=value, as in run.steps=1000, lists as [1,2], parts as {{a: 1}}, "
                "and quote what holds spaces"
            ) from error
    for override in overrides:
        if override.is_sweep_override():
            raise SettingsError(f"{override.input_line}: several values make several runs; add --multirun, or give one")
        if override.type is not OverrideType.CHANGE:
            raise SettingsError(f"{override.input_line}: settings are written key=value; null switches a part off")
    return overrides


def _check(given: Mapping[str, object]) -> None:
    """Refuse words that no configuration could take."""
    for key in given.keys() & DERIVED.keys():
        raise SettingsError(f"{key} follows from {DERIVED[key]}; set that one")
    for key, value in given.items():
        if key.startswith(("hydra.", "hydra/")):
            raise SettingsError(f"{key}: is read with --multirun alone; add that, or leave this out")
        if key in _GROUPS and isinstance(value, list):
            said = f"{key}=[{','.join(map(str, value))}]: one is chosen, by its name"
            raise SettingsError(f"{said}; allowed: {key}=NAME, or --multirun {key}=A,B for a run of each")
        if key in _PATHS and value == "":
            raise SettingsError(f"{key}='': names nothing; give a path, or leave it out")
    if given.get("run.train_time") is not None and "run.steps" in given:
        raise SettingsError(
            f"run.train_time={given['run.train_time']}: measures how many steps there are, and run.steps="
            f"{given['run.steps']} says it; give one of the two"
        )


def _set(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield what a word sets: a part that is given whole sets its fields."""
    yield key, value
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _set(f"{key}.{name}", inner)


def _fresh(words: Sequence[str], given: Mapping[str, object]) -> DictConfig:
    """Compose a new run: the demo preset where no data is named, the named model, then the user's words."""
    words = [quoted(word) for word in words]
    if given.get("data.train") is None and "preset" not in given and not given.get("plan.dry"):
        words = ["preset=demo", *words]
    named = encoder_config(str(_compose(words).model))
    model = [f"hjepa.encoder.{field}={_plain(getattr(named, field))}" for field in _NAMED]
    return _compose([*model, *words])


def _fit_world(plain: DictConfig) -> None:
    """Take DDP for several processes, and one for a run that goes on alone, where nothing else is asked for."""
    several = (plain.plan.world_size if plain.plan.dry else int(os.environ.get("WORLD_SIZE", "1"))) > 1
    if several and plain.parallel == ParallelKind.single:
        plain.parallel = ParallelKind.ddp
    elif not several and plain.parallel == ParallelKind.ddp:
        plain.parallel = ParallelKind.single


def _shorten_warmup(plain: DictConfig) -> None:
    """Keep a recipe's warm-up within a fifth of a run that is shorter than the recipe was made for."""
    rate, limit = plain.trainer.learning_rate, plain.run.steps // 5
    if rate.unit is ScheduleUnit.steps and rate.warmup_steps > limit:
        rate.warmup_steps = limit


def _name_idle(plain: DictConfig, given: Mapping[str, object]) -> None:
    """Say which of the given settings nothing reads in this run."""
    averages = plain.baseline is None and plain.hjepa.targets not in WITHOUT_EMA
    optimizer = plain.trainer.optimizer.kind
    hides = _hides(plain) or plain.baseline is not None  # told below
    crowned = plain.baseline is None and plain.hjepa.global_level is not None
    across = plain.baseline is None and plain.hjepa.prediction is Prediction.view
    fewer = plain.data.views <= (1 if plain.baseline is not None else plain.hjepa.masked_views)
    for names, needed, there in (
        (("trainer.compile_mode", "trainer.compile_backend"), "trainer.compile=true", plain.trainer.compile),
        (("trainer.ema_momentum",), "hjepa.targets=ema or pooled", averages),
        (("trainer.optimizer.muon_",), "trainer.optimizer.kind=muon", optimizer is OptimizerKind.muon),
        (("trainer.optimizer.momentum", "trainer.optimizer.trust"), "trainer.optimizer.kind=lars",
         optimizer is OptimizerKind.lars),
        (("trainer.optimizer.betas",), "trainer.optimizer.kind=adamw, muon or lion",
         optimizer is not OptimizerKind.lars),
        (("trainer.optimizer.eps", "trainer.optimizer.fused"), "trainer.optimizer.kind=adamw or muon",
         optimizer in (OptimizerKind.adamw, OptimizerKind.muon)),
        (("trainer.parallel.find_unused_parameters",), "parallel=ddp", plain.parallel is ParallelKind.ddp),
        (("trainer.parallel.fsdp",), "parallel=fsdp", plain.parallel is ParallelKind.fsdp),
        (("monitor.lr_",), "monitor.policy=lower_lr", plain.monitor.policy is CollapsePolicy.lower_lr),
        (("data.local_size", "data.local_scale"), "data.local_views", plain.data.local_views),
        (("data.local_views",), "hjepa.global_level", crowned or not plain.data.local_views),
        (("data.views",), "hjepa.global_level or prediction=view", crowned or across or fewer),
        (("masks",), "hjepa.prediction=hidden and a level weight", hides),
        (("hjepa.predictor.mode",), "hjepa.prediction=hidden", plain.hjepa.prediction is Prediction.hidden),
        (("profiler",), "profile=true", plain.profile),
        (("logger.",), "loggers=[wandb] or [mlflow]", {LoggerKind.wandb, LoggerKind.mlflow} & set(plain.loggers)),
    ):  # fmt: skip
        idle = sorted(key for key in given if key.startswith(names))
        if idle and not there:
            logger.warning("without %s nothing reads %s", needed, ", ".join(idle))
    if plain.baseline is None:
        return
    masks = plain.baseline.kind is BaselineKind.mae
    read = ("hjepa.encoder", "hjepa.predictor", "masks") if masks else ("hjepa.encoder",)
    idle = sorted(key for key in given if key.startswith(("hjepa.", "masks")) and not key.startswith(read))
    if idle:
        logger.warning("recipe=%s does not read %s", plain.recipe, ", ".join(idle))


def _hides(plain: DictConfig) -> bool:
    """Whether the run hides patches: `PretrainConfig.hides_patches` before there is one."""
    if plain.baseline is not None:
        return plain.baseline.kind is BaselineKind.mae
    return plain.hjepa.prediction is Prediction.hidden and any(plain.hjepa.level_weights.weights)


def _name_lonely(config: PretrainConfig) -> None:
    """Say which levels learn nothing, because a token that is alone in its image has no other to be told from."""
    hjepa = config.hjepa
    scope = (hjepa.objective, hjepa.contrast)
    if config.baseline is not None or scope != (Objective.patch_discrimination, ContrastScope.image):
        return
    tokens = tokens_per_axis(hjepa.encoder.image_size, hjepa.output_patches[-1])
    grid = pooling_grid(tokens, hjepa.pyramid.pooling)
    weights = hjepa.level_weights.weights
    lonely = [level for level, weight in enumerate(weights) if weight and max(grid) <= 2**level]
    if lonely:
        logger.warning(
            "hjepa.contrast=image: level %d has one token, whose loss is 0; give hjepa.contrast=batch or fewer levels",
            lonely[0],
        )


def _derive(plain: DictConfig) -> None:
    """Fill in what follows from another setting (`DERIVED`)."""
    plain.trainer.steps = plain.run.steps
    plain.trainer.samples_per_step = plain.data.batch_size
    plain.trainer.parallel.kind = plain.parallel
    plain.trainer.parallel.device = plain.run.device
    # Ramps are fractions of the run; a run of one step has none.
    plain.hjepa.level_weights.ramp_steps = max(2, plain.run.steps)
    if plain.hjepa.patch_schedule is not None:
        plain.hjepa.patch_schedule.total_steps = max(2, plain.run.steps)
    encoder = plain.hjepa.encoder
    encoder.image_size = plain.data.image_size
    sides = list(zip(encoder.image_size, encoder.processing_patch_size or encoder.patch_size, strict=False))
    if any(size % patch for size, patch in sides):
        OmegaConf.to_object(encoder)  # says what is wrong with the size
    elif _hides(plain):
        # Masks hide what the blocks of the encoder see. Those that nobody draws need not fit it.
        plain.masks.grid = [size // patch for size, patch in sides]


def quoted(word: str) -> str:
    """Quote a path, whose braces hydra would read as a dictionary and whose tilde a shell leaves after `=`."""
    key, _, value = word.partition("=")
    if key not in _PATHS or value in ("null", "") or value[0] in "'\"":
        return word
    # hydra reads backslashes as such, but for those before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), os.path.expanduser(value))
    return f"{key}='{escaped}'"


def _plain(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _compose(words: Sequence[str]) -> DictConfig:
    register()
    # hydra cannot fill a part that is off: parts that are given whole are put in once the recipe is composed.
    parts = _optional_parts(OmegaConf.structured(PretrainConfig))
    whole = [word for word in words if word.partition("=")[0] in parts and "={" in word]
    late = whole + [word for word in words if word.startswith(tuple(f"{one.partition('=')[0]}." for one in whole))]
    try:
        with initialize_config_module(config_module="hjepa_pretrain.conf", version_base="1.3"):
            plain = compose(config_name="config", overrides=[word for word in words if word not in late])
        for override in OverridesParser.create().parse_overrides(overrides=late):
            _update(plain, str(override.key_or_group), override.value())
        return plain
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
        if _NULL_PART in str(error):
            inside = [word for word in words if word.startswith(tuple(f"{part}." for part in parts))]
            _refuse_null_parts(_compose([word for word in words if word not in inside]), inside)
        raise SettingsError(one_line(error)) from error


def _refuse_null_parts(plain: DictConfig, words: Sequence[str]) -> None:
    """Name the words that set a field of a part that is off, with the one that would switch it on."""
    for part in _optional_parts(OmegaConf.structured(PretrainConfig)):
        inside = [word for word in words if word.startswith(f"{part}.")]
        if inside and OmegaConf.select(plain, part) is None:
            inner = ", ".join(": ".join(word.removeprefix(f"{part}.").split("=", 1)) for word in inside)
            whole = shlex.quote(f"{part}={{{inner}}}")
            raise SettingsError(f"{', '.join(inside)}: {part} is null here; give it whole, as in {whole}")


def _update(plain: DictConfig, key: str, value: object) -> None:
    """Set a field, or fields of a part, which is switched on where it is off."""
    if isinstance(value, dict) and OmegaConf.select(plain, key) is None:
        parts = _optional_parts(OmegaConf.structured(PretrainConfig))
        if key in parts:
            OmegaConf.update(plain, key, OmegaConf.structured(parts[key]), merge=False)
    OmegaConf.update(plain, key, value, merge=True)


def _optional_parts(tree: DictConfig, prefix: str = "") -> dict[str, type]:
    """Return the parts that are off and what class they would have, by their dotted names."""
    found: dict[str, type] = {}
    for key in () if tree._is_none() or tree._is_missing() else map(str, tree):
        node = tree._get_node(key)
        if isinstance(node, DictConfig):
            kind = node._metadata.ref_type
            if node._is_none() and isinstance(kind, type):
                found[f"{prefix}{key}"] = kind
            found |= _optional_parts(node, f"{prefix}{key}.")
    return found


def _stored(given: Mapping[str, object]) -> DictConfig | None:
    if "run.dir" not in given or not holds_run(str(given["run.dir"])):
        return None
    path = Path(str(given["run.dir"])) / CONFIG_FILE
    try:
        content = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        content.pop("provenance", None)
        law = {"masks": OmegaConf.structured(MASK_LAWS[content.get("mask_law", "multiblock")])}
        merged = OmegaConf.merge(OmegaConf.structured(PretrainConfig), law, content)
    except (yaml.YAMLError, TypeError, ValueError, KeyError, OmegaConfBaseException) as error:
        detail = str(error).strip().splitlines()[0]
        raise SettingsError(f"{path} cannot be read as a configuration ({detail}); start another run.dir") from error
    assert isinstance(merged, DictConfig)
    return merged


def _amend(stored: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """Apply overrides to a stored run, and refuse a change that would make it another run."""
    plain = stored.copy()
    for override in overrides:
        key = str(override.key_or_group)
        _refuse_null_parts(plain, [str(override.input_line)])
        # On the command line of a new run this word chooses the law's class.
        _update(plain, "mask_law" if key == "masks" else key, override.value())
    if plain.run.train_time not in (None, stored.run.train_time):
        raise SettingsError(
            f"run.train_time={plain.run.train_time}: the run in {stored.run.dir} has its length, run.steps="
            f"{stored.run.steps}; change that, or start another run.dir"
        )
    if plain.run.steps != stored.run.steps:
        plain.run.train_time = None
    before, after = (dict(_leaves(OmegaConf.to_container(one, enum_to_str=True))) for one in (stored, plain))
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old != new and not key.startswith(CHANGEABLE):
            told = "masks" if key == "mask_law" else key
            raise SettingsError(
                f"{told}={new}: the run in {stored.run.dir} was started with {old}, so its checkpoints belong to "
                "another model or order; leave this setting out, or start another run.dir"
            )
    return plain


def flat(plain: DictConfig) -> dict[str, Any]:
    """Returns every setting by its dotted name."""
    return dict(_leaves(OmegaConf.to_container(plain, resolve=True, enum_to_str=True)))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _dotted(tree: Any, prefix: str = "") -> Iterator[str]:  # noqa: ANN401
    for key, value in tree.items():
        name = f"{prefix}{key}"
        yield name
        if isinstance(value, dict):
            yield from _dotted(value, f"{name}.")


def one_line(error: BaseException) -> str:
    """Turn hydra's and omegaconf's paragraphs into a sentence, with the nearest valid name of an unknown key."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(link) for link in chain)
    named = re.findall(r"Could not override '([^'=]+)", text)
    if re.search(r"Key '\S+' (is )?not in", text):
        named += re.findall(r"full_key: (\S+)", text)
    if named:
        # The longest: inside a part that was given whole, or as the user wrote it.
        return _unknown(max(named, key=len), plain_keys())
    choice = re.search(r"Could not find '([\w-]+)/([^']*)'", text)
    if choice:
        names = re.search(r"Available options in '[^']+':\n((?:\t\S+\n)+)", text)
        allowed = ", ".join(names[1].split()) if names else "see conf/"
        return f"{choice[1]}={choice[2]}: there is no such {choice[1]}; allowed: {allowed}"
    if "Config group override must be" in text:
        return "recipe, preset and masks are chosen by name; allowed: NAME, as in recipe=ijepa"
    key = re.search(r"full_key: (\S+)", text)
    reason = str(chain[-1]).strip().splitlines()
    if not key:
        return " ".join(reason)
    wanted = next((said for sign, said in _WANTED.items() if sign in reason[0]), "")
    return f"{key[1]}: {reason[0].rstrip('.')}{wanted}"


def in_full(line: str, words: Sequence[str]) -> str:
    """Give a field the name that the user wrote, or the whole one of a field that stands beside what the user wrote.

    The class that refuses it does not know where it stands.

    Args:
        line: says `field=value: what is wrong`.
        words: of the command line.
    """
    given = _given(_parse(words))
    name, _, rest = line.partition("=")
    found = [key for key in given if key.endswith(f".{name}")]
    if not found and "." in name:
        found = [key for key in plain_keys() if key.endswith(f".{name}")]
    elif not found:
        beside = {f"{key.rpartition('.')[0]}.{name}" for key in given}
        found = [key for key in plain_keys() if key in beside]
    if len(found) > 1:
        found = [key for key in found if rest.startswith(f"{given.get(key)}:")]
    return f"{found[0]}={rest}" if len(found) == 1 else line


def _unknown(key: str, known: Sequence[str]) -> str:
    if key in known:
        return f"{key} is no setting of this mask law; hjepa-pretrain --settings masks=NAME lists its own"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        last = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.7)]
    hint = f"did you mean {near[0]}?" if near else "hjepa-pretrain --settings lists all"
    return f"{key} is no setting; {hint}"
