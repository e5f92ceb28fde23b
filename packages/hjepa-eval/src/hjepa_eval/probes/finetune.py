"""Fine-tuning: the whole encoder is trained for classification, deeper layers faster than shallow ones."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hjepa_eval.extraction.blocks import find_blocks, pool_tokens
from hjepa_eval.probes.accuracy import check_known, count_classes
from hjepa_eval.probes.heads import learning_rate_factor

Batches = Iterable[tuple[Tensor, ...]]


@dataclass(kw_only=True, slots=True)
class FineTuneConfig:
    """How an encoder is fine-tuned with AdamW.

    Attributes:
        learning_rate: Peak learning rate of the head, for batches of any size.
        layer_decay: Factor of the learning rate from each block to the one before it, in (0, 1].
        weight_decay: Decoupled; not on biases, norms and what the module names in ``no_weight_decay()``.
        epochs: Passes over the training images.
        warmup: Share of the steps in which the rate rises linearly, in [0, 1); it falls to 0 by a cosine after.
        label_smoothing: Of the cross-entropy, in [0, 1).
        clip_norm: Largest norm of the gradient; None leaves it as it is.
    """

    learning_rate: float = 1e-3
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    epochs: int = 20
    warmup: float = 0.1
    label_smoothing: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} weight_decay={self.weight_decay}: above 0, and 0 or above"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay}: in (0, 1]; 0.65 to 0.75 is usual, 1 trains all alike")
        if self.epochs < 1 or not 0 <= self.warmup < 1 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"epochs={self.epochs} warmup={self.warmup} label_smoothing={self.label_smoothing}: at least 1, and "
                "shares in [0, 1)"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm}: above 0, or None")


class Classifier(nn.Module):
    """An encoder with a linear head on its pooled, layer-normed output.

    Args:
        encoder: Maps images to vectors [B, D], or tokens [B, N, D], which are pooled.
        width: D of the pooled output.
        num_classes: C.
        pooling: mean, cls or concat, where the encoder gives tokens.
        seed: Of the head's weights (normal of deviation 0.01).
    """

    def __init__(
        self, encoder: nn.Module, width: int, num_classes: int, *, pooling: str = "mean", seed: int = 0
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            nn.init.normal_(self.head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        pooled = pool_tokens(self.encoder(images), self.pooling, int(getattr(self.encoder, "num_prefix_tokens", 0)))
        logits: Tensor = self.head(self.norm(pooled))
        return logits


def layer_groups(
    module: nn.Module,
    *,
    learning_rate: float,
    layer_decay: float,
    weight_decay: float,
    blocks: Sequence[nn.Module] = (),
) -> list[dict[str, object]]:
    """Parameter groups with learning_rate * layer_decay^(L + 1 - layer).

    Of L blocks, number i is layer i + 1. What is registered before the first block (patch embedding, positions, class
    token) is layer 0; what lies between two (downsampling) is of the layer before it; what comes after the last (final
    norm, head) is layer L + 1.

    Args:
        module: The whole that is trained.
        learning_rate: Rate of the last layer.
        layer_decay: Factor from each layer to the one before it.
        weight_decay: For weights; 0 for what has one axis and for what a part names in ``no_weight_decay()``.
        blocks: The blocks; none: find_blocks(module), or under layer_decay=1 all as one layer.

    Returns:
        Groups for an optimizer, each with its layer under "layer".

    Raises:
        ValueError: Where no blocks are found and the rates of layers differ.

    Source:
        BEiT (arXiv 2106.08254), appendix; MAE (arXiv 2111.06377), table 9.
    """
    listed = list(blocks)
    if not listed and layer_decay != 1:  # without decay no layer differs
        try:
            listed = find_blocks(module)
        except ValueError:
            raise ValueError(
                f"layer_decay={layer_decay}: {type(module).__name__} has no list called blocks or layers; "
                "give its blocks as blocks=[...], or layer_decay=1"
            ) from None
    layer_of = {id(p): number + 1 for number, block in enumerate(listed) for p in block.parameters()}
    exempt = {
        id(part.get_parameter(name))
        for part in module.modules()
        if callable(names := getattr(part, "no_weight_decay", None))
        for name in names()
        if name in dict(part.named_parameters())
    }
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    reached, last = 0, max(layer_of.values(), default=0)
    for parameter in module.parameters():
        layer = layer_of.get(id(parameter), reached if reached < last else len(listed) + 1)
        reached = max(reached, layer)
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in exempt
            groups.setdefault((layer, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (len(listed) + 1 - layer),
            "weight_decay": weight_decay if decays else 0.0,
            "layer": layer,
        }
        for (layer, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def finetune(
    classifier: nn.Module,
    batches: Callable[[int], Batches],
    steps_per_epoch: int,
    config: FineTuneConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    blocks: Sequence[nn.Module] = (),
) -> list[float]:
    """Train a classifier with layer decay; under DDP give the wrapped module, and each rank its own batches.

    Args:
        classifier: Maps images to logits [B, C], e.g. a Classifier; trained in place.
        batches: The (images, labels) of an epoch, by its number; augmentation is theirs.
        steps_per_epoch: Batches of an epoch; further ones are not read. An epoch that has fewer ends early, and the
            next goes on with the rates of its own steps.
        config: Rates, decays, epochs.
        device: Where it is trained.
        blocks: The blocks for layer decay; none: the list called blocks or layers.

    Returns:
        Mean loss of each epoch.

    Raises:
        ValueError: Where an epoch has no batch, a label is unknown or no class of the head, or the loss is not finite.
    """
    config = FineTuneConfig() if config is None else config
    classifier.to(device)
    groups = layer_groups(
        classifier,
        learning_rate=config.learning_rate,
        layer_decay=config.layer_decay,
        weight_decay=config.weight_decay,
        blocks=blocks,
    )
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps, history = config.epochs * steps_per_epoch, []
    classifier.train()
    for epoch in range(config.epochs):
        losses = []
        for number, (images, labels, *_) in enumerate(_first(batches(epoch), steps_per_epoch)):
            factor = learning_rate_factor(epoch * steps_per_epoch + number, steps, config.warmup)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            check_known(labels)
            logits = classifier(images.to(device))
            count_classes(labels, logits.shape[1])
            loss = F.cross_entropy(logits, labels.to(device).long(), label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(classifier.parameters(), config.clip_norm)
            optimizer.step()
            losses.append(loss.detach())
        if not losses:
            raise ValueError(f"batches: epoch {epoch} has none; check the data")
        history.append(float(torch.stack(losses).mean()))
        if not torch.isfinite(torch.tensor(history[-1])):
            raise ValueError(f"learning_rate={config.learning_rate}: the loss is not finite in epoch {epoch}; lower it")
    return history


def classify(classifier: nn.Module, batches: Batches, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Whether each labelled sample of a stream is classified rightly, over all processes, each sample once.

    Args:
        classifier: Maps images to logits [B, C].
        batches: (images, labels) of this process's part, with sample numbers where a sampler pads (see extract).
        device: Where it runs.

    Returns:
        Whether each sample is right (booleans, for ``bootstrap``), and its label.
    """
    from hjepa_eval.extraction.extract import extract

    classifier.to(device)
    logits = extract(classifier, batches, device=device, level="logits", gather=True)["logits"].labelled()
    return logits.values.argmax(dim=1) == logits.labels, logits.labels


def _first(batches: Batches, count: int) -> Batches:
    for number, batch in enumerate(batches):
        if number == count:
            return
        yield batch
