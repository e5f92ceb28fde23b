"""The predictor: guesses the tokens of hidden patches from visible ones, or those of a view from another's."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import check_drop_path, check_heads, check_positive, coerce_choice
from hjepa_models.crops import CHANGES, Relation
from hjepa_models.encoder import EncoderConfig, check_position, grid_positions
from hjepa_models.grid import Grid, grid_coordinates, sincos_positions
from hjepa_models.initialization import construct, initialize, truncated_normal_
from hjepa_models.layers.block import Transformer
from hjepa_models.objectives.kl import KLBalance
from hjepa_models.state import HybridState, StateConfig


class PredictorMode(StrEnum):
    """Whether an image's target blocks are predicted in one sequence or each on its own.

    `joint`: the context and all mask tokens see one another. `per_block`: a sequence per block, the context repeated
    (I-JEPA). `isolated`: one sequence in which a block sees itself and the context, and the context only itself: blocks
    stay apart as with `per_block`, without its repetition.
    """

    joint = "joint"
    per_block = "per_block"
    isolated = "isolated"


@dataclass(kw_only=True, slots=True)
class PredictorConfig:
    """Describes a predictor; positions, attention, MLP, norms and checkpointing are those of the encoder.

    Attributes:
        depth: number of blocks.
        embed_dim: width inside the predictor.
        num_heads: attention heads; must divide `embed_dim`.
        mode: `joint` (context and all mask tokens in one sequence), `per_block` (the context repeated per block) or
            `isolated` (one sequence in which blocks do not see one another).
        mlp_ratio: hidden width of the feed-forward part over `embed_dim`.
        drop_path: as in the encoder, and by its schedule.
        state: a hybrid state over the blocks of an image, in their order, whose features are added to the mask tokens
            of each block; None leaves it out. In training it sees the block's mean target through categoricals, for
            which the loss charges; what it foresees is for evaluation.
    """

    depth: int = 6
    embed_dim: int = 384
    num_heads: int = 12
    mode: PredictorMode = PredictorMode.joint
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    state: StateConfig | None = None

    def __post_init__(self) -> None:
        """Coerce names and refuse what cannot be built."""
        self.mode = coerce_choice(PredictorMode, "mode", self.mode)
        check_positive(depth=self.depth, embed_dim=self.embed_dim, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio)
        check_drop_path("predictor.drop_path", self.drop_path)
        check_heads("predictor", self.embed_dim, self.num_heads)

    def build(self, encoder: EncoderConfig, *, seed: int = 0, device: torch.device | str | None = None) -> "Predictor":
        """Return the predictor for the tokens of `encoder`, its weights drawn from `seed`."""
        return construct(lambda: Predictor(self, encoder), seed, device)


class Predictor(nn.Module):
    """A narrow transformer from context tokens and positions to the tokens expected there.

    Args:
        config: its description.
        encoder: of the encoder whose tokens it sees.
        views: it is for `across`, and learns what a change of size or direction does to a patch.
    """

    def __init__(self, config: PredictorConfig, encoder: EncoderConfig, *, views: bool = False) -> None:
        super().__init__()
        check_position("predictor", encoder.position, config.embed_dim, config.num_heads, len(encoder.grid))
        self.config = config
        self.grid = encoder.grid
        self.init_std = encoder.init_std
        dim = config.embed_dim
        self.input = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = grid_positions(encoder, dim, config.num_heads, config.depth)
        self.transformer = Transformer(
            dim,
            config.depth,
            config.num_heads,
            mlp=encoder.mlp,
            mlp_ratio=config.mlp_ratio,
            qk_norm=encoder.qk_norm,
            layer_scale=encoder.layer_scale,
            drop_path=config.drop_path,
            drop_path_schedule=encoder.drop_path_schedule,
            attention=encoder.attention,
            activation_checkpointing=encoder.activation_checkpointing,
        )
        self.output = nn.Linear(dim, encoder.embed_dim)
        self.change = nn.Linear(CHANGES, dim) if views else None
        self.state: HybridState | None = None
        if config.state is not None:
            self.state = HybridState(config.state, dim, encoder.embed_dim, encoder.embed_dim)
            self.condition = nn.Linear(self.state.feature_dim, dim)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator."""
        initialize(self, generator, self.init_std)
        self.positions.init_weights(generator, self.init_std)
        truncated_normal_(self.mask_token, self.init_std, generator)
        if self.state is not None:
            self.state.init_weights(generator)

    def forward(
        self,
        context: Float[Tensor, "B Kc D"],
        context_index: Int[Tensor, "B Kc"],
        target_index: Int[Tensor, "B M Kt"],
        grid: Grid | None = None,
        condition: Float[Tensor, "B M P"] | None = None,
    ) -> Float[Tensor, "B M Kt D"]:
        """Predict the tokens of the target blocks.

        Args:
            context: tokens of the visible patches.
            context_index: their flat positions.
            target_index: flat positions of the tokens wanted; blocks may overlap.
            grid: tokens per axis where it is not the configured grid.
            condition: what `rollout` gives, added to the mask tokens of each block.

        Returns:
            Predicted tokens at the encoder's width.
        """
        batch, blocks, count = target_index.shape
        grid = grid or self.grid
        mask = self.mask_token.expand(batch, blocks * count, -1)
        if condition is not None:
            mask = mask + condition.repeat_interleave(count, 1)
        if self.config.mode is PredictorMode.per_block:
            out = self._sequence(
                context.repeat_interleave(blocks, 0),
                context_index.repeat_interleave(blocks, 0),
                target_index.flatten(0, 1),
                mask.reshape(batch * blocks, count, -1),
                grid,
            )
        else:
            group = None
            if self.config.mode is PredictorMode.isolated:
                block = torch.arange(blocks, device=context.device).repeat_interleave(count) + 1
                group = torch.nn.functional.pad(block, (context_index.shape[1], 0))
            out = self._sequence(context, context_index, target_index.flatten(1), mask, grid, group)
        return out.reshape(batch, blocks, count, -1)

    def _sequence(
        self,
        context: Tensor,
        context_index: Tensor,
        target_index: Tensor,
        mask: Tensor,
        grid: Grid,
        group: Tensor | None = None,
    ) -> Tensor:
        visible = context_index.shape[1]
        index = torch.cat([context_index, target_index], dim=1)
        projected = self.input(context)
        tokens = torch.cat([projected, mask.to(projected.dtype)], dim=1)
        tokens = self.positions.add(tokens, grid, index)
        places = self.positions.places(grid, index, tokens.device)
        tokens = self.transformer(tokens, [place._replace(group=group) for place in places])
        out: Tensor = self.output(tokens[:, visible:])
        return out

    def across(
        self, context: Float[Tensor, "B N D"], relation: Relation, grid: Grid | None = None
    ) -> Float[Tensor, "B N D"]:
        """Predict the tokens of one view of an image from those of another.

        Args:
            context: all tokens of the other view, row-major.
            relation: how the patches of the first stand to it.
            grid: rows and columns of tokens of both where they are not the configured ones.

        Returns:
            Predicted tokens at the encoder's width, row-major.

        Raises:
            ValueError: for a predictor that was not built for views, or whose positions are those of a grid alone.

        Source:
            After Tao et al. 2022 (Siamese Image Modeling, arXiv 2206.01204), section 3.1: the decoder knows where the
            crops lie to each other, and how much larger one is. Unlike there, the view that is seen is not masked,
            and that one view is mirrored is told to the predictor.
        """
        if self.change is None:
            raise ValueError(
                "views=False: the predictor knows no crops; allowed: that of a model with prediction=view; build one"
            )
        reference = self.positions.reference
        own = grid_coordinates(grid or self.grid, reference, context.device).expand(len(context), -1, -1)
        # Positions are counted on the reference grid, as for patches.
        there = [place * size - 0.5 for place, size in zip(relation.places.unbind(-1), reference, strict=True)]
        projected = self.input(context)
        change = self.change(relation.change.to(self.change.weight.dtype)).unsqueeze(1)
        mask = (self.mask_token + change).expand(-1, context.shape[1], -1)
        tokens = torch.cat([projected, mask.to(projected.dtype)], dim=1)
        tokens, places = self.positions.at(tokens, torch.cat([own, torch.stack(there, dim=-1)], dim=1))
        out: Tensor = self.output(self.transformer(tokens, places)[:, context.shape[1] :])
        return out

    def rollout(
        self,
        context: Float[Tensor, "B Kc D"],
        target_index: Int[Tensor, "B M Kt"],
        grid: Grid,
        seed: int | Int[Tensor, "*R"],
        targets: Float[Tensor, "B M D"] | None = None,
    ) -> tuple[Float[Tensor, "B M P"], KLBalance | None]:
        """Roll the hybrid state over the blocks, and say what it adds to their mask tokens.

        A block's action is the mean position of its tokens; the state starts at the mean visible token.

        Args:
            context: tokens of the visible patches.
            target_index: flat positions of the blocks.
            grid: tokens per axis.
            seed: of the noise, e.g. the step; or one for each row.
            targets: mean target of each block, which the posterior sees; None foresees the blocks by the prior.

        Returns:
            What to give to `forward` as its condition, and the divergence where there are targets.

        Raises:
            ValueError: for a predictor without a state.
        """
        if self.state is None:
            raise ValueError("state=None: the predictor has no hybrid state; allowed: with a StateConfig; set one")
        # Measured in sixteenths of the image, at every resolution.
        coordinates = grid_coordinates(grid, (16,) * len(grid), context.device)
        places = sincos_positions(coordinates, self.config.embed_dim)
        actions, start = places[target_index].mean(2), self.state.initial(len(context), context.mean(1))
        if targets is None:
            return self.condition(self.state.imagine(start, actions, seed).features), None
        seen = self.state.observe(actions, targets, seed, start)
        return self.condition(seen.features), self.state.loss(seen, actions, seed)
