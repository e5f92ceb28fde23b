"""Project and aggregate: the tokens of an image become one vector, for contrast between images."""

import itertools
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hjepa_models._validation import check_positive, coerce_choice
from hjepa_models.initialization import construct, initialize
from hjepa_models.objectives.prediction import mean_token


class Aggregation(StrEnum):
    """Whether tokens are averaged before they are projected or after."""

    mean_first = "mean_first"
    project_first = "project_first"


@dataclass(kw_only=True, slots=True)
class AggregateConfig:
    """Describes how tokens become one vector.

    Attributes:
        hidden_dim: width of the hidden maps; without effect at depth 1.
        out_dim: width of the vector.
        depth: number of linear maps, a ReLU between each two.
        aggregate: `mean_first` projects the mean token, `project_first` averages projected tokens; with depth 1 they
            are the same.
    """

    hidden_dim: int = 2048
    out_dim: int = 128
    depth: int = 2
    aggregate: Aggregation = Aggregation.mean_first

    def __post_init__(self) -> None:
        """Coerce names and refuse what cannot be built."""
        self.aggregate = coerce_choice(Aggregation, "aggregate", self.aggregate)
        check_positive(hidden_dim=self.hidden_dim, out_dim=self.out_dim, depth=self.depth)

    def build(
        self, embed_dim: int, *, seed: int = 0, device: torch.device | str | None = None
    ) -> "ProjectAndAggregate":
        """Return the module for tokens of width `embed_dim`, its weights drawn from `seed`."""
        return construct(lambda: ProjectAndAggregate(self, embed_dim), seed, device)


class ProjectAndAggregate(nn.Module):
    """Projects tokens and averages those of an image, in either order.

    Source:
        OlmoEarth (arXiv 2511.13655), instance contrast.
    """

    def __init__(self, config: AggregateConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        widths = [embed_dim, *[config.hidden_dim] * (config.depth - 1), config.out_dim]
        layers: list[nn.Module] = []
        for wide, out in itertools.pairwise(widths):
            layers += [nn.Linear(wide, out), nn.ReLU()]
        self.projection = nn.Sequential(*layers[:-1])

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator."""
        initialize(self, generator, fan_in=True)

    def forward(
        self, tokens: Float[Tensor, "B K D"], weight: Float[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B P"]:
        """Return one vector for each image.

        Args:
            tokens: the tokens of each image.
            weight: weight of each token in the mean; None means 1.

        Returns:
            The vectors; of an image without a known token: the projection of 0 (`mean_first`) or 0.
        """
        if self.config.aggregate is Aggregation.project_first:
            return mean_token(self.projection(tokens), weight)
        # The mean is taken in float32 and handed on in the dtype of the tokens, which the projection may share.
        out: Tensor = self.projection(mean_token(tokens, weight).to(tokens.dtype))
        return out
