"""The global level: the pooled embedding of a whole view agrees with those of the image's other views."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import check_not_negative, check_positive, coerce_choice
from hjepa_models.initialization import construct, initialize
from hjepa_models.layers.attention_pool import AttentionPool
from hjepa_models.layers.norm import GlobalBatchNorm
from hjepa_models.objectives.contrastive import nt_xent
from hjepa_models.objectives.sigreg import check_knots, sigreg
from hjepa_models.objectives.vicreg import vicreg_terms


class GlobalObjective(StrEnum):
    """What keeps the embeddings from collapsing."""

    sigreg = "sigreg"
    vicreg = "vicreg"
    nt_xent = "nt_xent"


class ProjectorNorm(StrEnum):
    """The norm after each hidden map of the projector."""

    batch = "batch"
    layer = "layer"
    none = "none"


@dataclass(kw_only=True, slots=True)
class GlobalConfig:
    """Describes the global level.

    Attributes:
        pool_heads: heads of the attention that pools the tokens of a view; 0 takes their mean.
        stem_maps: maps of the encoder's stem, counted from the coarsest, that are levels of this kind too, each with a
            pool and a projector of its own; the term is the mean over all.
        hidden_dim: width of the hidden maps of the projector.
        depth: number of linear maps of the projector.
        out_dim: width of the embedding that the views agree on.
        norm: `batch` (statistics over all processes), `layer` or `none`, after each hidden map.
        objective: `sigreg` (LeJEPA), `vicreg` or `nt_xent` (SimCLR).
        weight: weight of the term in the loss.
        sigreg_lambda: share λ of SIGReg in (1 - λ) invariance + λ SIGReg.
        num_directions: random directions of SIGReg a step.
        knots: points of SIGReg's quadrature.
        vicreg_invariance: weight of VICReg's invariance term.
        vicreg_variance: weight of its variance term.
        vicreg_covariance: weight of its covariance term.
        temperature: of NT-Xent's softmax.
    """

    pool_heads: int = 0
    stem_maps: int = 0
    hidden_dim: int = 2048
    depth: int = 3
    out_dim: int = 128
    norm: ProjectorNorm = ProjectorNorm.batch
    objective: GlobalObjective = GlobalObjective.sigreg
    weight: float = 1.0
    sigreg_lambda: float = 0.05
    num_directions: int = 1024
    knots: int = 17
    vicreg_invariance: float = 25.0
    vicreg_variance: float = 25.0
    vicreg_covariance: float = 1.0
    temperature: float = 0.2

    def __post_init__(self) -> None:
        """Coerce names and refuse what cannot be built."""
        self.norm = coerce_choice(ProjectorNorm, "norm", self.norm)
        self.objective = coerce_choice(GlobalObjective, "objective", self.objective)
        check_positive(
            hidden_dim=self.hidden_dim,
            depth=self.depth,
            out_dim=self.out_dim,
            num_directions=self.num_directions,
            temperature=self.temperature,
        )
        check_not_negative(
            pool_heads=self.pool_heads,
            stem_maps=self.stem_maps,
            weight=self.weight,
            vicreg_invariance=self.vicreg_invariance,
            vicreg_variance=self.vicreg_variance,
            vicreg_covariance=self.vicreg_covariance,
        )
        if not 0 <= self.sigreg_lambda <= 1:
            raise ValueError(f"sigreg_lambda={self.sigreg_lambda}: not a share; allowed: 0 to 1; use e.g. 0.05")
        check_knots(self.knots)

    def build(self, embed_dim: int, *, seed: int = 0, device: torch.device | str | None = None) -> "GlobalLevel":
        """Return the level for encoder tokens of width `embed_dim`, its weights drawn from `seed`."""
        return construct(lambda: GlobalLevel(self, embed_dim), seed, device)


class GlobalLevel(nn.Module):
    """Pools tokens, projects them and scores how well an image's views agree.

    Args:
        config: its description.
        width: of the tokens.
        norm: tokens come from no norm and are layer-normed first, as the places of a map of the stem are.
    """

    def __init__(self, config: GlobalConfig, width: int, *, norm: bool = False) -> None:
        super().__init__()
        self.config = config
        # A bias would be a constant that a projector with batch norm takes away, and drift.
        self.norm = nn.LayerNorm(width, bias=False) if norm else nn.Identity()
        self.pool = AttentionPool(width, config.pool_heads) if config.pool_heads else None
        kinds = {ProjectorNorm.batch: GlobalBatchNorm, ProjectorNorm.layer: nn.LayerNorm, ProjectorNorm.none: None}
        kind = kinds[config.norm]
        layers: list[nn.Module] = []
        for _ in range(config.depth - 1):
            layers.append(nn.Linear(width, config.hidden_dim))
            if kind is not None:
                layers.append(kind(config.hidden_dim))
            layers.append(nn.GELU())
            width = config.hidden_dim
        layers.append(nn.Linear(width, config.out_dim))
        self.projector = nn.Sequential(*layers)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator."""
        initialize(self.projector, generator, fan_in=True)
        initialize(self.norm, generator)
        if self.pool is not None:
            self.pool.init_weights(generator)

    def pooled(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        """Return one vector of the tokens of a view: their mean, weighted or not."""
        tokens = self.norm(tokens)
        return tokens.mean(1) if self.pool is None else self.pool(tokens)

    def forward(self, pooled: Float[Tensor, "*V B D"]) -> Float[Tensor, "*V B P"]:
        """Return the projected embeddings; batch norm takes all rows together."""
        out: Tensor = self.projector(pooled.flatten(0, -2))
        return out.reshape(*pooled.shape[:-1], -1)

    def loss(
        self, z: Float[Tensor, "V B P"], step: int | Int[Tensor, ""], whole: int | None = None
    ) -> Float[Tensor, ""]:
        r"""Return the global term.

        SIGReg: $(1-\lambda)\,\frac1V\sum_v \|z_v - \bar z\|^2 / P + \lambda\,\frac1V\sum_v \mathrm{SIGReg}(z_v)$,
        with the mean $\bar z$ over the views that are not small.
        VICReg: the invariance of each pair of views, averaged over pairs; variance and covariance of all views' rows
        together, which are draws of one law: more rows than one view has say more about its covariance.
        NT-Xent: the mean over pairs of views.
        Two small views need not agree: what they show may have nothing in common.

        Args:
            z: projected embeddings of each view.
            step: seeds the directions of SIGReg.
            whole: how many views, the first ones, are not small; None means all.

        Returns:
            The unweighted term.

        Source:
            LeJEPA (arXiv 2511.08544), section 5, with the invariance averaged over the P channels; VICReg
            (arXiv 2105.04906), equation 6; SimCLR (arXiv 2002.05709), equation 1; which pairs: SwAV (arXiv 2006.09882),
            equation 6.
        """
        config = self.config
        whole = len(z) if whole is None else whole
        if config.objective is GlobalObjective.nt_xent:
            return nt_xent(z, config.temperature, whole)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if config.objective is GlobalObjective.sigreg:
            spread = (z - z[:whole].mean(0)).square().mean()
            keep = sigreg(z, step, config.num_directions, config.knots)
            return (1 - config.sigreg_lambda) * spread + config.sigreg_lambda * keep
        terms = vicreg_terms(z.flatten(0, 1))
        return (
            config.vicreg_invariance * _pair_difference(z, whole)
            + 2 * config.vicreg_variance * terms.variance
            + 2 * config.vicreg_covariance * terms.covariance
        )


def _pair_difference(z: Float[Tensor, "V B P"], whole: int) -> Float[Tensor, ""]:
    """Return the mean square of the differences of pairs of views, but those of two small ones; 0 without a pair."""
    views = len(z)
    if whole == views:
        # The same from the differences to their mean, of which there are fewer.
        return (z - z.mean(0)).square().mean() * (2 * views / max(views - 1, 1))
    return torch.cat([z[view + 1 :] - z[view] for view in range(whole)]).square().mean()
