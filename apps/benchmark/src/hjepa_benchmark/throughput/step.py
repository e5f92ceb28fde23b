"""The training step of a run on synthetic images, whole and in its parts."""

import statistics
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from hjepa_benchmark.throughput.clock import milliseconds
from hjepa_data import Batch, normalize
from hjepa_models import HJEPA, Block, Prediction, dense_canvas, num_tokens, scatter_to_canvas
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.task import build_task
from hjepa_train import EMA
from hjepa_train.graph import compile_module, multiply_in_fp8, recompute_activations
from hjepa_train.precision import autocast

PREDICTOR, PYRAMID, UPDATE, EMA_PART = "predictor", "pyramid, losses", "optimizer", "EMA"
_WHOLE = "whole"


class TrainingStep:
    """Forward, backward, clipping, optimizer and EMA of a run, at its last steps, when every level has its weight.

    Args:
        config: of the run.
        device: where it runs.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.task = build_task(config).to(device).train()
        self.optimizer = config.trainer.optimizer.build(self.task)
        self.ema = EMA(self.task.ema_pairs())
        self.batch = synthetic_batch(config, device)
        self.every = 1 if config.baseline is not None else config.hjepa.predict_every
        self._trained = [parameter for parameter in self.task.parameters() if parameter.requires_grad]

    def recompute(self) -> None:
        """Let blocks run again in the backward pass, where the run says so: operations are counted before."""
        recompute_activations(self.task, self.config.trainer.recompute)

    def compile(self) -> None:
        """Multiply in 8 bits and compile as the trainer does, where the run says so."""
        trainer = self.config.trainer
        if trainer.fp8:
            multiply_in_fp8(self.task, (Block,))
        if trainer.compile:
            compile_module(self.task, (Block,), whole=True, backend=trainer.compile_backend, mode=trainer.compile_mode)

    def __call__(self, number: int) -> None:
        """Do one step; of `every` steps in turn, one has the masked term."""
        self.forward_backward(number)
        self.update()
        self.move_target()

    def forward_backward(self, number: int) -> None:
        """Loss and gradients."""
        with autocast(self.config.trainer.precision, self.device):
            output = self.task(self.batch, self.step_of(number))
        output.loss.backward()

    def update(self) -> None:
        """Clip, step, forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self._trained, self.config.trainer.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def move_target(self) -> None:
        """Move the target branch."""
        self.ema.update(0.996)

    @property
    def predicts(self) -> Prediction | None:
        """What an H-JEPA predicts from what at one of its last steps; None for a step without prediction."""
        return self.config.hjepa.predicts if isinstance(self.task.model, HJEPA) else None

    def draw_masks(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Draw context and targets of the batch, where the step hides patches."""
        return self.task.draw_masks(0, self.batch.sample) if self.config.hides_patches else (None, None)

    def step_of(self, number: int) -> int:
        """The step of the run that call `number` does: the last ones, over and over."""
        return self.config.run.steps - 1 - number % self.every

    def parts(self, repeats: int, warmup: int) -> dict[str, float]:
        """Milliseconds of each part of a step, mean over `every` steps.

        Masks, target, context, and pyramid with the level losses are timed alone, with their own backward pass; what
        forward and backward take beyond them is the predictor's.

        Args:
            repeats: timed calls of each.
            warmup: calls before them.
        """
        alone = self._alone
        times: dict[str, list[float]] = {
            name: [] for name in (*(name for name, _, _ in alone), _WHOLE, UPDATE, EMA_PART)
        }
        lead = partial(self.forward_backward, 0)
        # One after the other in every round, so that all see the machine in the same state.
        for _ in range(warmup + repeats):
            group = []
            for number in range(self.every):
                group.append(milliseconds(partial(self.forward_backward, number), self.device, lead))
                update = milliseconds(self.update, self.device, lead)
                target = milliseconds(self.move_target, self.device, lead)
            times[_WHOLE].append(statistics.mean(group))
            times[UPDATE].append(update)
            times[EMA_PART].append(target)
            for name, work, share in alone:
                times[name].append(milliseconds(work, self.device, lead) * share)
            self.optimizer.zero_grad(set_to_none=True)
        found = {name: statistics.median(values[warmup:]) for name, values in times.items()}
        rest = found.pop(_WHOLE) - sum(found[name] for name, _, _ in alone)
        parts = {name: found[name] for name, _, _ in alone}
        parts[self._rest] = max(0.0, rest)
        return parts | {name: found[name] for name in (UPDATE, EMA_PART)}

    @property
    def _rest(self) -> str:
        """What forward and backward do beyond the parts that can run alone."""
        if not isinstance(self.task.model, HJEPA):
            return "forward, backward"
        return PREDICTOR if self.predicts else "projectors, loss"

    @cached_property
    def _alone(self) -> list[tuple[str, Callable[[], object], float]]:
        """Parts that can run by themselves: name, work, and how much of it a step has on average."""
        config, model = self.config, self.task.model
        images = [normalize(view, config.data.mean, config.data.std) for view in self.batch.views]
        wanted = torch.cat(images[: 2 if self.predicts is Prediction.view else config.hjepa.masked_views])
        context, targets = self.draw_masks()
        share = 1 / self.every

        def prepare() -> None:
            for view in self.batch.views:
                normalize(view, config.data.mean, config.data.std)

        found: list[tuple[str, Callable[[], object], float]] = [("input", prepare, 1.0)]
        if context is not None:
            found.append(("masks", partial(self.task.draw_masks, 0, self.batch.sample), share))
        if not isinstance(model, HJEPA):
            return found
        if self.predicts and model.target_encoder is not None:
            found.append(("target", self._forward(model.target_encoder, wanted), share))
        if context is not None:
            found.append(("context", self._both(model.encoder, wanted, context), share))
        if self.predicts and not model.config.encoder.output_patch_size:
            index = None if targets is None else targets.flatten(1)
            found.append((PYRAMID, self._pyramid(model, len(wanted), index), share))
        if model.config.encodes_views:
            found.append(("whole views", self._both(partial(_encode, model), *images), 1.0))
        return found

    def _forward(self, module: torch.nn.Module, *arguments: Tensor) -> Callable[[], object]:
        call = self._maybe_compiled(module)

        def work() -> None:
            with torch.no_grad(), autocast(self.config.trainer.precision, self.device):
                call(*arguments)

        return work

    def _both(self, module: Callable[..., Tensor], *arguments: Tensor) -> Callable[[], object]:
        call = self._maybe_compiled(module)

        def work() -> None:
            with autocast(self.config.trainer.precision, self.device):
                tokens = call(*arguments)
            torch.autograd.backward(tokens.float().mean())

        return work

    def _pyramid(self, model: HJEPA, rows: int, index: Tensor | None) -> Callable[[], object]:
        """Both sides of every level, from predicted and wanted tokens, at `index` or everywhere, and their losses."""
        grid, weights = model.encoder.grid, model.config.level_weights.weights
        count, dtype = num_tokens(grid) if index is None else index.shape[1], self.config.trainer.precision.dtype
        shape = (rows, count, model.config.encoder.embed_dim)
        wanted = torch.randn(shape, device=self.device)
        predicted = torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True)

        def loss(predicted: Tensor, wanted: Tensor) -> Tensor:
            canvases = [
                dense_canvas(tokens, grid) if index is None else scatter_to_canvas(tokens, index, grid)
                for tokens in (wanted, predicted)
            ]
            with torch.no_grad():
                targets = model.target_levels(canvases[0])
            predictions = model.pyramid(canvases[1])
            # The finest level is scored on its tokens, the others on their canvas.
            places = [index, *[None] * (len(weights) - 1)]
            losses = map(model.losses.level, predictions, targets, places)
            terms = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
            return torch.stack(terms).sum()

        call = self._maybe_compiled(loss)

        def work() -> None:
            with autocast(self.config.trainer.precision, self.device):
                total = call(predicted, wanted)
            torch.autograd.backward(total)

        return work

    def _maybe_compiled(self, module: Callable[..., Tensor]) -> Callable[..., Tensor]:
        trainer = self.config.trainer
        if not trainer.compile:
            return module

        # A new function: the module itself stays as the step has it.
        def call(*arguments: Tensor) -> Tensor:
            out: Tensor = module(*arguments)
            return out

        return torch.compile(call, dynamic=False, backend=trainer.compile_backend)


def _encode(model: HJEPA, *views: Tensor) -> Tensor:
    """Tokens [n, D] of all views."""
    return torch.cat([tokens.flatten(0, 1) for tokens, *_ in model.encode_views(views)])


def synthetic_batch(config: PretrainConfig, device: torch.device) -> Batch:
    """Random pixels of a batch of the run, local views among them, each that of a whole image, on the device."""
    generator = torch.Generator().manual_seed(0)
    count, channels = config.data.batch_size, config.hjepa.encoder.in_channels
    views = tuple(
        torch.randint(0, 256, (count, channels, *group.size), dtype=torch.uint8, generator=generator)
        for group in config.data.stream(1).views
        for _ in range(group.count)
    )
    classes = None if config.baseline is None else config.baseline.num_classes
    labels = torch.full((count,), -1) if classes is None else torch.arange(count) % classes
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).repeat(count, 1)
    return Batch(
        views=views,
        labels=labels,
        sample=torch.arange(count),
        epoch=torch.zeros(count, dtype=torch.int64),
        crops=(whole,) * len(views),
    ).to(device)
