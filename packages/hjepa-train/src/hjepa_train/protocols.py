"""What the trainer asks of a module, a stream and a callback; it knows nothing else about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from hjepa_train.outcome import Outcome
    from hjepa_train.trainer import StepResult, Trainer


class Output(Protocol):
    """What the forward of a trained module returns."""

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The scalar to minimise: a mean over the batch, so that ranks and micro-batches average."""

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """Scalars to log by name, without prefix; the same names on every rank."""

    @property
    def embeddings(self) -> Mapping[str, Float[Tensor, "n D"]]:
        """Detached embeddings by level for the collapse monitor; may be empty."""


@dataclass(kw_only=True, slots=True)
class StepOutput:
    """A ready-made `Output`."""

    loss: Float[Tensor, ""]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)


class Batch(Protocol):
    """One batch of a rank."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """Return the batch on a device."""

    def __len__(self) -> int:
        """Number of samples (images, clips) in the batch of this rank."""


class Stream(Protocol):
    """An infinite, resumable source of batches, one per rank."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the present state on."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a JSON file can hold, the same on every rank: what has been *yielded*, not what is prefetched."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state, so that the next `iter` yields what the stream would have yielded."""


@runtime_checkable
class HasEMA(Protocol):
    """A module with exponential-moving-average copies that the trainer has to update."""

    def ema_pairs(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return (online, target) modules of equal structure."""


@runtime_checkable
class Compilable(Protocol):
    """A module that knows what of its step can be compiled; `compile=true` calls it."""

    def compile_step(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the step in place, with options of `torch.compile`."""


@runtime_checkable
class SkipsParameters(Protocol):
    """A module that knows whether steps leave trained parameters without a gradient; DDP has to know."""

    @property
    def may_skip_parameters(self) -> bool:
        """Whether some steps do."""


@runtime_checkable
class Cyclic(Protocol):
    """A module whose steps are of several kinds, in turn."""

    @property
    def cycle(self) -> int:
        """Steps after which their kinds begin anew."""


class Callback:
    """Everything that is not the step itself. Subclasses override what they need.

    Hooks run in the order of the list of callbacks, on every rank. In `on_step_end` a callback may call
    `trainer.log`, `trainer.announce`, `trainer.request_save` and `trainer.request_stop`.
    """

    @property
    def key(self) -> str:
        """Name of this callback's state in a checkpoint; a second callback of it gets `<key> 2`, and so on."""
        return type(self).__name__

    def on_fit_start(self, trainer: Trainer) -> None:
        """Run once, after the checkpoint is restored and before the first step."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Run after each optimizer step and EMA update; `trainer.step` counts the step that has just ended."""

    def on_row(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Run when the step has something logged: `row` is `step` and scalars, averaged over ranks."""

    def on_save(self, trainer: Trainer) -> None:
        """Run when a checkpoint of this step is taken; it is written and committed after this."""

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Run once at the end, whatever happens; `outcome` is None where an error ended the run."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a JSON file can hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; called before `on_fit_start`."""
