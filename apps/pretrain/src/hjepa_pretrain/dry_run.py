"""What a run would take on machines that are not here: memory, bytes sent and time of a step, per rank."""

from collections.abc import Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hjepa_data.transforms.crop import NUMBERS_PER_CROP
from hjepa_models import Block
from hjepa_pretrain import settings
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.uncut import uncut
from hjepa_train.graph import recompute_activations
from hjepa_train.plan import Plan, StepCost, fake_tensors, plan_step, step_cost


def dry_run(words: Sequence[str], config: PretrainConfig, console: Console) -> dict[str, Plan]:
    """Print a column for each model of `plan.models`, or for the run's own; return them.

    Args:
        words: the command line, of which all but the model holds for every column.
        config: of the run.
        console: where the table goes.

    Raises:
        ValueError: the batch cannot be dealt to so many ranks.
    """
    kept = [word for word in words if not word.startswith("model=")]
    plans = {}
    for name in config.plan.models or (config.model,):
        plans[name] = plan_model(settings.load([*kept, f"model={name}"], quiet=True)[0])
    console.print(table(plans, config))
    machine = config.plan.machine
    offloaded = any(plan.host_bytes for plan in plans.values())
    console.print(
        f"a step with all its terms, {_images(config)} images a rank in {config.trainer.accumulate} micro-batches; "
        f"{machine.efficiency:.0%} of {machine.peak_tflops:g} TFLOP/s; {machine.bandwidth_gb:g} GB/s, nothing sent "
        "while something is computed; eager, so that a compiled step keeps less"
        + ("; neither the bus nor the optimizer on the host is in the time" if offloaded else ""),
        highlight=False,
    )
    return plans


def plan_model(config: PretrainConfig) -> Plan:
    """Return the plan of a step of one rank, without memory for the model."""
    cost = step_cost_of(config)
    model = config.hjepa.build(seed=config.run.seed, device="meta")
    return plan_step(model, cost, config.trainer, config.plan.world_size, config.plan.machine, (Block,))


def step_cost_of(config: PretrainConfig) -> StepCost:
    """Return what the passes of a micro-batch of one rank take, at a step with all its terms."""
    if config.baseline is not None:
        raise settings.SettingsError("plan.dry: counts an H-JEPA; leave baseline out")
    rows, step = _images(config) // config.trainer.accumulate, _fullest_step(config)
    # Before tensors are fake: masks are drawn by their values.
    masks = config.masks.build(config.run.seed)(step, torch.arange(2)) if config.hides_patches else None
    count = rows * config.hjepa.masked_views
    model = config.hjepa.build(seed=config.run.seed, device="meta")
    recompute_activations(model, config.trainer.recompute)
    with fake_tensors(model):
        groups = config.data.stream(1).views
        views = [torch.empty(rows, 3, *group.size) for group in groups for _ in range(group.count)]
        context = targets = None
        if masks is not None:
            context = torch.zeros(count, *masks.context.shape[1:], dtype=torch.int64)
            targets = torch.zeros(count, *masks.targets.shape[1:], dtype=torch.int64)
        crops = [torch.ones(rows, NUMBERS_PER_CROP)] * len(views)
        return step_cost(model, lambda: model(views, context, targets, step, crops).loss, config.trainer)


def table(plans: dict[str, Plan], config: PretrainConfig) -> Table:
    """Return a row for each figure, a column for each model."""
    limit = config.plan.machine.memory_gib
    title = f"{config.parallel} on {config.plan.world_size} ranks"
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(("per rank", *plans)):
        grid.add_column(name, justify="right" if number else "left", no_wrap=True)
    each = list(plans.values())
    grid.add_row("parameters", *(f"{p.parameters / 1e6:,.0f} M" for p in each))
    grid.add_row("of them trained", *(f"{p.trained / 1e6:,.0f} M" for p in each))
    for label, name in (
        ("weights", "parameter_bytes"), ("gradients", "gradient_bytes"), ("optimizer", "optimizer_bytes"),
        ("activations", "activation_bytes"), ("at the peak", "working_bytes"),
        ("gathered weights", "gathered_bytes"), ("memory", "memory_bytes"),
    ):  # fmt: skip
        grid.add_row(label, *(_size(getattr(p, name)) for p in each))
    grid.add_row(f"of {limit:g} GiB", *(f"{p.memory_bytes / 2**30 / limit:.0%}" for p in each))
    if any(p.host_bytes for p in each):
        grid.add_row("memory of the host", *(_size(p.host_bytes) for p in each))
        grid.add_row("over the bus a step", *(f"{p.bus_bytes / 1e9:,.3f} GB" for p in each))
    grid.add_row("sent a step", *(f"{p.sent_bytes / 1e9:,.3f} GB" for p in each))
    grid.add_row("arithmetic a step", *(f"{p.flops / 1e12:,.2f} TFLOP" for p in each))
    grid.add_row("step", *(f"{p.seconds * 1e3:,.1f} ms" for p in each))
    grid.add_row("  compute", *(f"{p.compute_seconds * 1e3:,.1f} ms" for p in each))
    grid.add_row("  send", *(f"{p.send_seconds * 1e3:,.1f} ms" for p in each))
    grid.add_row("images/s, all ranks", *(f"{config.data.batch_size / p.seconds:,.0f}" for p in each))
    return uncut(grid)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _images(config: PretrainConfig) -> int:
    parts = config.plan.world_size * config.trainer.accumulate
    if config.data.batch_size % parts:
        raise settings.SettingsError(
            f"data.batch_size={config.data.batch_size}: plan.world_size={config.plan.world_size} and "
            f"trainer.accumulate={config.trainer.accumulate} do not divide it; allowed: multiples of {parts}"
        )
    return config.data.batch_size // config.plan.world_size


def _fullest_step(config: PretrainConfig) -> int:
    """Return the last step that computes the predicted term, when every level of a curriculum has come in."""
    every = config.hjepa.predict_every
    return max(config.run.steps // every, 1) * every - 1
