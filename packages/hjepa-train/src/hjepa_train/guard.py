"""A step whose loss or gradient is not finite, or spikes, is left out; too many in a row end the run with a dump."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hjepa_train.checkpoint.files import write_json
from hjepa_train.errors import DivergedError, one_line
from hjepa_train.protocols import Batch, Cyclic
from hjepa_train.sharded import local

if TYPE_CHECKING:
    from hjepa_train.parallel import World

logger = logging.getLogger(__name__)

_TOLD = 100
"""Bad steps of which a dump tells at most, and so of which anything is remembered."""
_MANY = 0.1
"""Share of the steps of a window that are left out, above which a line says so."""


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """What a bad step is, and how many in a row are left out."""

    max_skips: int = 3
    """Bad steps in a row that are left out (no optimizer step, no EMA); one more ends the run. 0 bears none."""
    spike: float | None = None
    """Bad is also a loss or gradient norm above this multiple of its running median, which is that of each kind of step
    where the module's `cycle` has several; None: only what is not finite."""
    window: int = 100
    """Good steps in a running median; it judges once a fifth of them are there."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.max_skips < 0:
            raise ValueError(f"max_skips={self.max_skips}: negative; allowed: 0 (bear no bad step) and more")
        if self.spike is not None and not self.spike > 1.0:
            raise ValueError(f"spike={self.spike}: half of all steps are above; allowed: above 1, e.g. 10, or null")
        if self.window < 5:
            raise ValueError(f"window={self.window}: too short for a median; allowed: 5 and more")


def running_median(values: Float[Tensor, "2 W"], count: Int[Tensor, ""]) -> Float[Tensor, 2]:
    """Return the lower median of the first min(count, W) values of each row, without waiting for the device.

    >>> running_median(torch.tensor([[3.0, 1.0, 2.0, 9.0], [5.0, 4.0, 7.0, 0.0]]), torch.tensor(3))
    tensor([2., 5.])
    """
    known = count.clamp(max=values.shape[1])
    place = torch.arange(values.shape[1], device=values.device)
    ordered = torch.where(place < known, values, torch.inf).sort(dim=1).values
    middle = ((known - 1).clamp(min=0) // 2).expand(len(values), 1)
    return ordered.gather(1, middle).squeeze(1)


@dataclass(kw_only=True, slots=True)
class _Record:
    """What a dump tells of a step."""

    step: int
    generators: dict[str, Tensor]
    samples: list[Tensor] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    values: Tensor | None = None
    bad: Tensor | None = None


class Guard:
    """Judges each step on the device, keeps what the forward pass may have spoilt, and remembers the last steps.

    A CPU decides on the host. A GPU is never waited for: the optimizer and the EMA make the update one that changes
    nothing, and the host asks every `check_every` steps whether there were too many. From the step that is one too
    many on, all are left out until then. All ranks see the same loss and norm, and so decide alike.

    Args:
        config: What is bad.
        module: Its persistent buffers (running statistics) are put back after a bad step; its `cycle` is optional.
        world: Ranks and device.
        check_every: Steps between the host's questions on a GPU.
        folder: Where a dump goes; None means that there is none.
    """

    def __init__(
        self, config: GuardConfig, module: nn.Module, world: World, *, check_every: int, folder: Path | None
    ) -> None:
        self.config, self.world, self.folder = config, world, folder
        # Also where a GPU computes and the weights are kept by the host.
        self.on_host = any(local(parameter).device.type == "cpu" for parameter in module.parameters())
        self._check_every = check_every
        self._module = module
        self._persistent = module.state_dict().keys()
        self._before: list[Tensor] = []
        self._records: deque[_Record] = deque(maxlen=min(config.max_skips, _TOLD) + 2 + check_every)
        device = world.device
        cycle = module.cycle if isinstance(module, Cyclic) else 1
        self._values = torch.zeros(cycle, 2, config.window, device=device)
        self._count = torch.zeros(cycle, dtype=torch.int64, device=device)
        self._streak = torch.zeros((), dtype=torch.int64, device=device)
        self._halted = torch.full((), -1, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Steps left out since the run began."""
        self._known: tuple[int, int] | None = None
        self._many = False

    def begin(self, step: int) -> None:
        """Keep what a step may spoil before its forward pass."""
        generators = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.world.device)
        self._records.append(_Record(step=step + 1, generators=generators))
        self._before = [_joined(buffers) for buffers in self._buffers()]

    def saw(self, batch: Batch) -> None:
        """Remember which samples a micro-batch had, where it says so."""
        sample = getattr(batch, "sample", None)
        if isinstance(sample, Tensor):
            # A copy: what lies in the memory of a batch keeps its stream from using that again.
            self._records[-1].samples.append(sample.clone())

    def judge(self, loss: Float[Tensor, ""], grad_norm: Float[Tensor, ""], rates: dict[str, float]) -> Bool[Tensor, ""]:
        """Tell whether this step is to be left out, and put back the buffers of one that is.

        Args:
            loss: Of this rank.
            grad_norm: Over all ranks.
            rates: Of this step, for a dump.
        """
        mean = self.world.sum(loss.detach().clone().float()) / self.world.size
        now = torch.stack([mean, grad_norm.detach().to(mean)])
        bad = ~now.isfinite().all()
        step = self._records[-1].step
        place = (step - 1) % len(self._values)
        values, count = self._values[place], self._count[place]
        if self.config.spike is not None:
            median = running_median(values, count)
            above = ((now > self.config.spike * median) & (median > 0)).any()
            bad = bad | (above & (count >= max(1, self.config.window // 5)))
        self._streak = torch.where(bad, self._streak + 1, 0)
        over = (self._halted < 0) & (self._streak > self.config.max_skips)
        self._halted = torch.where(over, step, self._halted)
        bad = bad | (self._halted >= 0)
        slot = torch.arange(self.config.window, device=now.device) == count % self.config.window
        values.copy_(torch.where(slot & ~bad, now[:, None], values))
        count.add_((~bad).long())
        self.skipped = self.skipped + bad.long()
        record = self._records[-1]
        record.values, record.bad, record.rates = now, bad, rates
        self._put_back(bad)
        return bad

    def check(self, step: int, *, now: bool = False) -> None:
        """Ask whether too many steps in a row were bad, where it is time, and say where many of late were.

        Raises:
            DivergedError: Where they were; a dump of the last steps has been written.
        """
        if not (now or self.on_host or step % self._check_every == 0):
            return
        halted, skipped = torch.stack([self._halted, self.skipped]).tolist()
        spike = self.config.spike
        fault = "the loss or its gradient is not finite"
        fault += "" if spike is None else f" or above {spike:g} times its running median"
        self._say_many(step, skipped, fault)
        if halted < 0:
            return
        place = self._dump(halted)
        count = self.config.max_skips + 1
        after = f", for {count} steps in a row" if count > 1 else ""
        look = "" if place is None else f"look at {place}, then "
        raise DivergedError(
            f"step {halted}: {fault}{after}; nothing of it was applied; {look}"
            "start again to resume from the last checkpoint, with a lower learning rate, a longer warm-up or "
            "precision=fp32; if it ends so again, remove the newest folder in checkpoints first: its weights have the "
            "fault already"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the values of the running medians, oldest first, in two rows a place of the cycle, and the counts."""
        rows = []
        for values, count in zip(self._values, self._count.tolist(), strict=True):
            known = min(count, self.config.window)
            first = count % self.config.window if known == self.config.window else 0
            rows += values[:, :known].roll(-first, dims=1).tolist()
        return {"values": rows, "streak": int(self._streak), "skipped": int(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; a window that has changed keeps the newest values, a cycle that has begins them anew."""
        rows = state["values"]
        if len(rows) == 2 * len(self._values):
            for place, count in enumerate(self._count):
                values = torch.tensor(rows[2 * place : 2 * place + 2]).reshape(2, -1)[:, -self.config.window :]
                self._values[place, :, : values.shape[1]] = values.to(self._values.device)
                count.fill_(values.shape[1])
        self._streak.fill_(state["streak"])
        self.skipped.fill_(state["skipped"])

    def _say_many(self, step: int, skipped: int, fault: str) -> None:
        """Say once, until there are fewer, that many of the last steps were left out."""
        first, before = self._known or (step, skipped)
        length, count = step - first, skipped - before
        if self._known is not None and length < self.config.window:
            return
        many = count > _MANY * length
        if many and not self._many and self.world.is_main:
            higher = "" if self.config.spike is None else ", or raise guard.spike"
            text = "step %d: %d of the last %d steps were left out: %s; lower the learning rate%s"
            logger.warning(text, step, count, length, fault, higher)
        self._known, self._many = (step, skipped), many

    @torch.no_grad()
    def _put_back(self, bad: Tensor) -> None:
        if self.on_host and not bool(bad):
            return
        # All of them: batch norm writes to its statistics without a word to the tensors' versions.
        for buffers, before in zip(self._buffers(), self._before, strict=True):
            kept = torch.split(torch.where(bad, before, _joined(buffers)), [buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view(buffer.shape) for part, buffer in zip(kept, buffers, strict=True)])

    def _buffers(self) -> list[list[Tensor]]:
        """Return the buffers that a checkpoint holds, those of one type and device together."""
        found: defaultdict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for name, buffer in self._module.named_buffers():
            if name in self._persistent:
                part = local(buffer.detach())
                found[part.dtype, part.device].append(part)
        return list(found.values())

    def _dump(self, halted: int) -> Path | None:
        """Write the last steps of this rank as JSON and safetensors; None where there is no folder or no room."""
        if self.folder is None:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        place = self.folder / f"step_{halted:08d}"
        tensors: dict[str, Tensor] = {}
        steps = []
        for record in self._records:
            if record.values is None or record.bad is None:
                continue
            loss, grad_norm = record.values.tolist()
            numbers = torch.cat(record.samples) if record.samples else torch.zeros(0, dtype=torch.int64)
            tensors[f"sample/{record.step}"] = numbers.cpu()
            tensors |= {f"generator/{name}/{record.step}": state for name, state in record.generators.items()}
            steps.append(
                {
                    "step": record.step,
                    "skipped": bool(record.bad),
                    "loss": _plain(loss),
                    "grad_norm": _plain(grad_norm),
                    **record.rates,
                    "sample": numbers.tolist(),
                }
            )
        broken = [
            name
            for name, parameter in self._module.named_parameters()
            if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all())
        ]
        content = {"step": halted, "rank": self.world.rank, "ranks": self.world.size, "steps": steps}
        try:
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / f"rank{self.world.rank}.json", {**content, "gradients_not_finite": broken})
            save_file(tensors, place / f"rank{self.world.rank}.safetensors")
        except (OSError, SafetensorError) as error:
            logger.warning("%s: the dump could not be written: %s", place, one_line(error))
            return None
        return place


def _joined(tensors: list[Tensor]) -> Tensor:
    """Copy tensors of one type into a row: one kernel, however many they are."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _plain(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if abs(value) < float("inf") else str(value)


def step_unless(optimizer: torch.optim.Optimizer, bad: Bool[Tensor, ""], *, on_host: bool) -> None:
    """Step an optimizer, unless the step is bad: then its parameters and its state stay bit for bit.

    Fused optimizers know how (`found_inf`, as under a gradient scaler). For the others the step is taken and undone on
    the device, which needs a copy of the parameters and of the state for that moment.

    Args:
        optimizer: Of torch, or of its kind.
        bad: Whether to leave the step out.
        on_host: Wait for `bad`, and do not call the optimizer at all.
    """
    if on_host:
        if not bool(bad):
            optimizer.step()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
    else:
        _step_and_undo(optimizer, bad)


@torch.no_grad()
def _step_and_undo(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    weights = [(local(parameter), local(parameter).clone()) for parameter in stepped]
    states = {
        (parameter, name): local(value).clone()
        for parameter in stepped
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    optimizer.step()
    for weight, before in weights:
        weight.copy_(torch.where(bad, before, weight))
    for parameter in stepped:
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # A state that this step has made was born as zeros.
                now = local(value)
                now.copy_(torch.where(bad, states.get((parameter, name), torch.zeros_like(now)), now))
