"""Linear segmentation: a class for every pixel from patch features, measured by mean intersection over union."""

from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hjepa_eval.extraction.gather import exchange
from hjepa_eval.probes.accuracy import check_finite, count_classes, split
from hjepa_eval.probes.heads import Candidate, HeadOptimizer, HeadTraining, best_candidate, train_heads
from hjepa_eval.probes.logistic import moments


def _training() -> HeadTraining:
    return HeadTraining(
        learning_rates=(1e-3, 1e-2), weight_decays=(1e-3,), epochs=20, batch_size=32, optimizer=HeadOptimizer.adamw
    )


class SegmentationProbe:
    """A linear classifier of patches whose logits are upsampled bilinearly to the pixels.

    Tokens are normalised over the training set in every dimension; heads are chosen by mIoU on held-out training
    images. Pixels with a class below 0 are unknown: they neither train nor count.

    Attributes:
        candidates: Every head with its held-out mIoU, after ``fit``.
        chosen: The head with the highest one, after ``fit``.
    """

    def __init__(self, config: HeadTraining | None = None) -> None:
        self.config = _training() if config is None else config
        self.candidates: list[Candidate] = []
        self.chosen: Candidate | None = None
        self._head: nn.Linear | None = None
        self._classes = 0
        self._grid = (0, 0)
        self._device = torch.device("cpu")
        self._mean = torch.empty(0)
        self._scale = torch.empty(0)

    def fit(
        self,
        tokens: Float[Tensor, "n N D"],
        masks: Int[Tensor, "n H W"],
        grid: tuple[int, int],
        num_classes: int | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Train all heads on one part of these images, choose on the other, and train the chosen one on all.

        Args:
            tokens: Patch tokens, row by row of the grid.
            masks: Class of every pixel, -1 where it is unknown.
            grid: Rows and columns of patches.
            num_classes: Number of classes; None: the largest + 1.
            device: Where the heads are trained.

        Returns:
            The probe itself.

        Raises:
            ValueError: Where shapes disagree, fewer than two images have a known pixel, or all heads diverge.
        """
        _check(tokens, masks, grid)
        masks = _known(masks)
        # An image of which nothing is known would leave a held-out part without a score.
        told = (masks >= 0).flatten(1).any(dim=1)
        if int(told.sum()) < 2:
            raise ValueError(f"masks: {int(told.sum())} images have a known pixel (0 and up); at least two are needed")
        tokens = tokens.detach()
        if not bool(told.all()):
            tokens, masks = tokens[told.to(tokens.device)], masks[told]
        training, self._device, self._grid = self.config, torch.device(device), grid
        self._classes = count_classes(masks, num_classes)
        self._mean, self._scale = (part.to(self._device) for part in moments(tokens.flatten(0, 1)))
        kept, held = split(len(tokens), training.held_out, training.seed)
        settings = training.grid()
        heads = self._train(tokens, masks, settings, kept)
        self.candidates = []
        for head, (rate, decay) in zip(heads, settings, strict=True):
            self._head = head
            finite = bool(head.weight.isfinite().all())
            # Of this process: others may fit other probes, or none.
            score = float(mean_iou(self.confusion(tokens[held], masks[held]).sum(dim=0))) if finite else -torch.inf
            self.candidates.append(Candidate(features="tokens", learning_rate=rate, weight_decay=decay, held_out=score))
        best = best_candidate(self.candidates, training)
        self.chosen, self._head = self.candidates[best], heads[best]
        if training.refit:
            (self._head,) = self._train(tokens, masks, [settings[best]], torch.arange(len(tokens)))
        return self

    def predict(self, tokens: Float[Tensor, "m N D"], size: tuple[int, int]) -> Int[Tensor, "m H W"]:
        """Classes of pixels.

        Args:
            tokens: Patch tokens of the same kind as those of ``fit``.
            size: Height and width of the answer, pixels.

        Returns:
            The class with the largest logit at each pixel, on the CPU.

        Raises:
            RuntimeError: Before ``fit``.
            ValueError: Where tokens have another shape or are not finite.
        """
        if self._head is None:
            raise RuntimeError("the probe is not fitted yet: call fit(tokens, masks, grid) first")
        fitted = (self._grid[0] * self._grid[1], self._head.in_features)
        if tokens.shape[1:] != fitted:
            raise ValueError(f"tokens {tuple(tokens.shape)}: fitted on [n, {fitted[0]}, {fitted[1]}]")
        check_finite(tokens, "tokens")
        with torch.no_grad():
            parts = torch.split(tokens, self.config.batch_size)
            return torch.cat([self._logits(self._head, part, size).argmax(dim=1).cpu() for part in parts])

    def confusion(self, tokens: Float[Tensor, "m N D"], masks: Int[Tensor, "m H W"]) -> Int[Tensor, "m C C"]:
        """Pixels of each image by true and predicted class, for ``bootstrap(confusion, mean_iou)``.

        Args:
            tokens: Test tokens.
            masks: Class of every pixel, -1 where it is unknown.

        Returns:
            Counts: [image, true class, predicted class].
        """
        masks = _of_images(masks, tokens)
        if not len(masks):
            raise ValueError("masks: there are none; at least one image is needed")
        classes = self._count(masks)
        predicted = self.predict(tokens, (masks.shape[1], masks.shape[2]))
        known = masks >= 0
        image = torch.arange(len(masks))[:, None, None].expand_as(masks)
        cell = (image * classes + masks) * classes + predicted
        counts = cell[known].bincount(minlength=len(masks) * classes**2)
        return counts.view(len(masks), classes, classes)

    def mean_iou(self, tokens: Float[Tensor, "m N D"], masks: Int[Tensor, "m H W"]) -> float:
        """Mean over classes of intersection over union of all pixels of all images of all processes, which all call it.

        Args:
            tokens: Test tokens of this process, which may have no image ([0, N, D]) where another has some.
            masks: Class of every pixel, -1 where it is unknown.

        Returns:
            mIoU in [0, 1] over the classes that are there, in truth or prediction.

        Raises:
            RuntimeError: Before ``fit``.
            ValueError: Where no process has an image, shapes disagree or tokens are not finite.
        """
        # torchmetrics brings torchvision and scipy along: seconds that only a measurement has to wait for.
        from torchmetrics.classification import MulticlassJaccardIndex

        masks = _of_images(masks, tokens)
        classes, images = zip(*exchange((self._count(masks), len(masks))), strict=True)
        if not any(images):
            raise ValueError("masks: there are none on any process; at least one image is needed")
        metric = MulticlassJaccardIndex(num_classes=max(classes), ignore_index=-1)
        metric.update(self.predict(tokens, (masks.shape[1], masks.shape[2])), masks)
        return float(metric.compute())

    def _count(self, masks: Tensor) -> int:
        """Number of classes, with those that only these masks have."""
        return max(self._classes, int(masks.max()) + 1) if masks.numel() else self._classes

    def _train(
        self, tokens: Tensor, masks: Tensor, settings: list[tuple[float, float]], samples: Tensor
    ) -> list[nn.Linear]:
        width = tokens.shape[2]
        heads = [nn.Linear(width, self._classes, device="meta").to_empty(device=self._device) for _ in settings]
        with torch.no_grad():
            for head in heads:
                head.weight.zero_()
                head.bias.zero_()

        def loss(batch: Tensor) -> Tensor:
            part, target = tokens[batch], masks[batch].to(self._device)
            size = (target.shape[1], target.shape[2])
            return torch.stack(
                [F.cross_entropy(self._logits(head, part, size), target, ignore_index=-1) for head in heads]
            )

        train_heads(heads, settings, loss, samples, self.config)
        return heads

    def _logits(self, head: nn.Linear, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        x = (tokens.to(self._device, torch.float32) - self._mean) / self._scale
        logits = head(x).transpose(1, 2).unflatten(2, self._grid)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def mean_iou(confusion: Float[Tensor, "*r C C"]) -> Float[Tensor, "*r"]:
    """Mean intersection over union of the classes that are there, in truth or prediction.

    IoU_c = n_cc / (sum_p n_cp + sum_t n_tc - n_cc)

    Args:
        confusion: Counts, or shares, by true and predicted class.

    Returns:
        mIoU of each matrix, in [0, 1], float64.
    """
    both = confusion.double().diagonal(dim1=-2, dim2=-1)
    union = confusion.double().sum(dim=-1) + confusion.double().sum(dim=-2) - both
    there = union > 0
    return (both / torch.where(there, union, 1.0)).sum(dim=-1) / there.sum(dim=-1)


def _known(masks: Tensor) -> Tensor:
    """Masks on the CPU in 64 bits, -1 for all that is unknown."""
    return masks.cpu().long().clamp_min(-1)


def _of_images(masks: Tensor, tokens: Tensor) -> Tensor:
    if masks.ndim != 3 or len(masks) != len(tokens):
        raise ValueError(f"masks {tuple(masks.shape)} for {len(tokens)} images: they must be [m, H, W], one for each")
    return _known(masks)


def _check(tokens: Tensor, masks: Tensor, grid: tuple[int, int]) -> None:
    if tokens.ndim != 3 or masks.ndim != 3 or len(tokens) != len(masks) or len(tokens) < 2 or not tokens.shape[2]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and masks {tuple(masks.shape)}: tokens must be [n, N, D] and masks "
            "[n, H, W] of the same images, at least two"
        )
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"grid={grid}: {grid[0] * grid[1]} patches, but there are {tokens.shape[1]} tokens an image")
