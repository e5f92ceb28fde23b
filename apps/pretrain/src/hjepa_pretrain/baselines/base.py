"""What every baseline is: an encoder of this project with a head of its own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models import Branch, Encoder, EncoderConfig, FeaturePool, HJEPAOutput


@dataclass(kw_only=True, slots=True)
class Inputs:
    """A batch; each method takes of it what it needs.

    Attributes:
        views: normalised pixels of each view of the same images.
        context_index: flat positions of the visible patches of the first view; None for a method that hides nothing.
        target_index: flat positions of its hidden patches, M blocks; likewise.
        labels: class numbers, -1 where unknown.
    """

    views: Sequence[Float[Tensor, "B C *S"]]
    context_index: Int[Tensor, "B Kc"] | None
    target_index: Int[Tensor, "B M Kt"] | None
    labels: Int[Tensor, " B"]


class Baseline(nn.Module, ABC):
    """An encoder and a head; only the encoder is kept in the end.

    Args:
        encoder: the same description as the H-JEPA's beside which it stands.
    """

    feature_levels: tuple[str | int, ...] = ("encoder",)
    may_skip_parameters = False
    masked = False
    """Whether it hides patches."""

    def __init__(self, encoder: EncoderConfig) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill the encoder first: from one seed it starts equal under every method."""
        self.encoder.init_weights(generator)
        self.init_head(generator)

    def needs_masks(self, step: int) -> bool:
        """Return whether a step hides patches: all of them or none."""
        return self.masked

    def compile_step(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the forward pass in place, with options of `torch.compile`."""
        self.compile(**options)

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """None of them has a moving average."""
        return []

    @abstractmethod
    def init_head(self, generator: torch.Generator) -> None:
        """Fill the head from a CPU generator."""

    @abstractmethod
    def forward(self, inputs: Inputs) -> HJEPAOutput:
        """Return the loss of one batch."""

    @torch.no_grad()
    def features(self, images: Float[Tensor, "B C *S"]) -> Float[Tensor, "B D"]:
        """Return the mean token of whole images, without gradient."""
        tokens: Tensor = self.encoder(images)
        return tokens.mean(1)

    @torch.no_grad()
    def all_features(
        self,
        images: Float[Tensor, "B C *S"],
        pool: FeaturePool | str = FeaturePool.mean,
        branch: Branch | str = Branch.target,
    ) -> dict[str | int, Tensor]:
        """Return the only level there is, `encoder`: its mean token, or all tokens with `pool="none"`.

        As in an H-JEPA without a moving average both branches are the one encoder.
        """
        tokens: Tensor = self.encoder(images)
        return {"encoder": tokens.mean(1) if pool == "mean" else tokens}


def scored(loss: Float[Tensor, ""], pooled: Float[Tensor, "B D"], **terms: Any) -> HJEPAOutput:  # noqa: ANN401
    """Return a loss and the embeddings of the first view in the form of an HJEPA's step."""
    return HJEPAOutput(loss, {name: term.detach() for name, term in terms.items()}, {"encoder": pooled.detach()})
