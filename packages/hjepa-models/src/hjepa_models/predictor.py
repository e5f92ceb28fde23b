"""The predictor: guesses the tokens of hidden patches from those of the visible ones."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import check_heads, check_not_negative, check_positive, coerce_choice
from hjepa_models.encoder import EncoderConfig, check_position
from hjepa_models.grid import Grid
from hjepa_models.initialization import construct, initialize, truncated_normal_
from hjepa_models.layers.block import Transformer
from hjepa_models.layers.positions import GridPositions


class PredictorMode(StrEnum):
    """Whether an image's target blocks are predicted in one sequence or each on its own."""

    joint = "joint"
    per_block = "per_block"


@dataclass(kw_only=True, slots=True)
class PredictorConfig:
    """Describes a predictor; positions, attention, MLP, norms and checkpointing are those of the encoder.

    Attributes:
        depth: number of blocks.
        embed_dim: width inside the predictor.
        num_heads: attention heads; must divide `embed_dim`.
        mode: `joint` (context and all mask tokens in one sequence) or `per_block` (the context repeated per block).
        mlp_ratio: hidden width of the feed-forward part over `embed_dim`.
        drop_path: as in the encoder.
    """

    depth: int = 6
    embed_dim: int = 384
    num_heads: int = 12
    mode: PredictorMode = PredictorMode.joint
    mlp_ratio: float = 4.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        """Coerce names and refuse what cannot be built."""
        self.mode = coerce_choice(PredictorMode, "mode", self.mode)
        check_positive(depth=self.depth, embed_dim=self.embed_dim, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio)
        check_not_negative(drop_path=self.drop_path)
        check_heads("predictor", self.embed_dim, self.num_heads)

    def build(self, encoder: EncoderConfig, *, seed: int = 0, device: torch.device | str | None = None) -> "Predictor":
        """Return the predictor for the tokens of `encoder`, its weights drawn from `seed`."""
        return construct(lambda: Predictor(self, encoder), seed, device)


class Predictor(nn.Module):
    """A narrow transformer from context tokens and positions to the tokens expected there."""

    def __init__(self, config: PredictorConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        check_position("predictor", encoder.position, config.embed_dim, config.num_heads, len(encoder.grid))
        self.config = config
        self.grid = encoder.grid
        self.init_std = encoder.init_std
        dim = config.embed_dim
        self.input = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = GridPositions(encoder.position, dim, config.num_heads, encoder.rope_theta, encoder.grid)
        self.transformer = Transformer(
            dim,
            config.depth,
            config.num_heads,
            mlp=encoder.mlp,
            mlp_ratio=config.mlp_ratio,
            qk_norm=encoder.qk_norm,
            layer_scale=encoder.layer_scale,
            drop_path=config.drop_path,
            attention=encoder.attention,
            activation_checkpointing=encoder.activation_checkpointing,
        )
        self.output = nn.Linear(dim, encoder.embed_dim)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator."""
        initialize(self, generator, self.init_std)
        truncated_normal_(self.mask_token, self.init_std, generator)

    def forward(
        self,
        context: Float[Tensor, "B Kc D"],
        context_index: Int[Tensor, "B Kc"],
        target_index: Int[Tensor, "B M Kt"],
        grid: Grid | None = None,
    ) -> Float[Tensor, "B M Kt D"]:
        """Predict the tokens of the target blocks.

        Args:
            context: tokens of the visible patches.
            context_index: their flat positions.
            target_index: flat positions of the tokens wanted; blocks may overlap.
            grid: tokens per axis where it is not the configured grid.

        Returns:
            Predicted tokens at the encoder's width.
        """
        batch, blocks, count = target_index.shape
        if self.config.mode is PredictorMode.joint:
            out = self._sequence(context, context_index, target_index.flatten(1), grid or self.grid)
        else:
            out = self._sequence(
                context.repeat_interleave(blocks, 0),
                context_index.repeat_interleave(blocks, 0),
                target_index.flatten(0, 1),
                grid or self.grid,
            )
        return out.reshape(batch, blocks, count, -1)

    def _sequence(self, context: Tensor, context_index: Tensor, target_index: Tensor, grid: Grid) -> Tensor:
        visible = context_index.shape[1]
        index = torch.cat([context_index, target_index], dim=1)
        projected = self.input(context)
        mask = self.mask_token.to(projected.dtype).expand(*target_index.shape, -1)
        tokens = torch.cat([projected, mask], dim=1)
        embedding = self.positions.embedding(grid, index, tokens.device)
        if embedding is not None:
            tokens = tokens + embedding
        tokens = self.transformer(tokens, self.positions.rotation(grid, index, tokens.device))
        out: Tensor = self.output(tokens[:, visible:])
        return out
