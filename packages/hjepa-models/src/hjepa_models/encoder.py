"""The encoder: a vision transformer on a grid of any number of axes that never sees the patches it is not given."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import check_axes, check_heads, check_not_negative, check_positive, coerce_choice
from hjepa_models.grid import Grid, gather_tokens, num_tokens
from hjepa_models.initialization import construct, initialize, truncated_normal_
from hjepa_models.layers.attention import AttentionBackend
from hjepa_models.layers.block import MlpKind, Transformer
from hjepa_models.layers.patch import CONVOLUTIONS, ConvStem, LinearStem, OverlapStem, Stem, StemNorm, patchify
from hjepa_models.layers.positions import GridPositions, Position


@dataclass(kw_only=True, slots=True)
class EncoderConfig:
    """Describes an encoder.

    Attributes:
        image_size: pixels per axis, (H, W) for images and (T, H, W) for clips.
        patch_size: pixels of a patch per axis; must divide `image_size`.
        in_channels: channels of a pixel.
        embed_dim: width D of a token.
        depth: number of blocks.
        num_heads: attention heads; must divide `embed_dim`.
        mlp_ratio: hidden width of the feed-forward part over `embed_dim`.
        mlp: `mlp` (GELU) or `swiglu`.
        position: `rope` (axial rotations of queries and keys) or `sincos` (added embeddings).
        rope_theta: base of the rotary frequencies; positions are counted in tokens.
        qk_norm: layer-norm queries and keys of each head.
        layer_scale: first value of the learned scale of each residual; None leaves it out.
        drop_path: rate at which the residuals of the last block are dropped in training; earlier blocks less, linearly.
        registers: learned tokens without a place, prepended and stripped again.
        stem: `linear`, `conv` (convolutions inside each patch, never across its border) or `overlap` (convolutions over
            the whole image, in which hidden patches are blanked first).
        stem_channels: channels after each strided stage of a convolutional stem.
        stem_norm: `none`, or `batch` after each of its convolutions, over all processes; its running statistics follow
            whole images, so that training has to encode some (a global level or `detached` targets do).
        activation_checkpointing: recompute blocks in the backward pass to save memory.
        attention: `sdpa`, or `explicit` (plain softmax; a faster backward on a CPU for short sequences).
        init_std: deviation of the truncated normal that fills the linear maps.
    """

    image_size: tuple[int, ...] = (224, 224)
    patch_size: tuple[int, ...] = (16, 16)
    in_channels: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    mlp: MlpKind = MlpKind.mlp
    position: Position = Position.rope
    rope_theta: float = 100.0
    qk_norm: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0
    registers: int = 0
    stem: Stem = Stem.linear
    stem_channels: tuple[int, ...] = (32, 64)
    stem_norm: StemNorm = StemNorm.none
    activation_checkpointing: bool = False
    attention: AttentionBackend = AttentionBackend.sdpa
    init_std: float = 0.02

    def __post_init__(self) -> None:
        """Coerce lists and names, and refuse what cannot be built."""
        self.image_size = check_axes("image_size", self.image_size)
        self.patch_size = check_axes("patch_size", self.patch_size)
        self.stem_channels = check_axes("stem_channels", self.stem_channels)
        self.mlp = coerce_choice(MlpKind, "mlp", self.mlp)
        self.position = coerce_choice(Position, "position", self.position)
        self.stem = coerce_choice(Stem, "stem", self.stem)
        self.stem_norm = coerce_choice(StemNorm, "stem_norm", self.stem_norm)
        self.attention = coerce_choice(AttentionBackend, "attention", self.attention)
        check_positive(
            in_channels=self.in_channels,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            rope_theta=self.rope_theta,
            init_std=self.init_std,
        )
        check_not_negative(registers=self.registers, drop_path=self.drop_path)
        check_image_size("image_size", self.image_size, self.patch_size)
        check_heads("encoder", self.embed_dim, self.num_heads)
        check_position("encoder", self.position, self.embed_dim, self.num_heads, len(self.patch_size))
        if self.drop_path >= 1:
            raise ValueError(f"drop_path={self.drop_path}: drops everything; allowed: 0 to below 1; use e.g. 0.1")
        if self.stem is Stem.linear and self.stem_norm is not StemNorm.none:
            raise ValueError(
                f"stem_norm={self.stem_norm}: stem=linear has no convolutions; allowed: none; use stem=conv or overlap"
            )
        if self.stem is not Stem.linear and len(self.patch_size) not in CONVOLUTIONS:
            raise ValueError(
                f"stem={self.stem}: no convolution has {len(self.patch_size)} axes; allowed: 1 to 3 axes; "
                "use stem=linear"
            )

    @property
    def grid(self) -> Grid:
        """Tokens per axis."""
        return tuple(size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))

    @property
    def num_patches(self) -> int:
        """Number of tokens N of the grid."""
        return num_tokens(self.grid)

    def build(self, *, seed: int = 0, device: torch.device | str | None = None) -> "Encoder":
        """Return the encoder, its weights drawn from `seed`; on the device "meta" it has no storage yet."""
        return construct(lambda: Encoder(self), seed, device)


def check_image_size(field: str, image_size: tuple[int, ...], patch_size: tuple[int, ...]) -> None:
    """Refuse an image that patches cannot tile, with the nearest sizes that they can."""
    if len(image_size) != len(patch_size):
        raise ValueError(
            f"{field}={image_size}: has {len(image_size)} axes where patch_size={patch_size} has {len(patch_size)}; "
            f"allowed: as many axes; give one size per axis to both"
        )
    for axis, (size, patch) in enumerate(zip(image_size, patch_size, strict=True)):
        if size % patch:
            low, high = size // patch * patch, -(-size // patch) * patch
            near = f"{low} or {high}" if low else f"{high}"
            raise ValueError(
                f"{field}={image_size}: axis {axis} has {size} pixels, which the patch size {patch} does not divide; "
                f"allowed: multiples of {patch}, nearest {near}; change image_size or patch_size"
            )


def check_position(owner: str, position: Position, embed_dim: int, num_heads: int, axes: int) -> None:
    """Refuse widths that leave an axis without a single frequency."""
    width = embed_dim // num_heads if position is Position.rope else embed_dim
    name = "embed_dim / num_heads" if position is Position.rope else "embed_dim"
    if width < 2 * axes or (position is Position.rope and width % 2):
        raise ValueError(
            f"{owner}.{name}={width}: too narrow or odd for position={position} on {axes} axes; "
            f"allowed: even, at least {2 * axes}; use fewer heads, a larger embed_dim or position=sincos"
        )


class Encoder(nn.Module):
    """Vision transformer that returns one normalised token for each patch it is given."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.stem = _build_stem(config)
        self.registers = nn.Parameter(torch.empty(1, config.registers, dim)) if config.registers else None
        self.positions = GridPositions(config.position, dim, config.num_heads, config.rope_theta, config.grid)
        self.transformer = Transformer(
            dim,
            config.depth,
            config.num_heads,
            mlp=config.mlp,
            mlp_ratio=config.mlp_ratio,
            qk_norm=config.qk_norm,
            layer_scale=config.layer_scale,
            drop_path=config.drop_path,
            attention=config.attention,
            activation_checkpointing=config.activation_checkpointing,
        )

    @property
    def grid(self) -> Grid:
        """Tokens per axis at the configured image size."""
        return self.config.grid

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator."""
        initialize(self, generator, self.config.init_std)
        if self.registers is not None:
            truncated_normal_(self.registers, self.config.init_std, generator)

    def grid_of(self, images: Float[Tensor, "B C *S"]) -> Grid:
        """Return the tokens per axis of these images.

        Raises:
            ValueError: for another number of axes or channels, or a size that the patch does not divide.
        """
        config = self.config
        if images.ndim != 2 + len(config.patch_size) or images.shape[1] != config.in_channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: do not fit the encoder; "
                f"allowed: [batch, {config.in_channels}, {', '.join(['size'] * len(config.patch_size))}]; "
                f"check axes and channels"
            )
        check_image_size("images", tuple(images.shape[2:]), config.patch_size)
        return tuple(size // patch for size, patch in zip(images.shape[2:], config.patch_size, strict=True))

    def patchify(self, images: Float[Tensor, "B C *S"]) -> Float[Tensor, "B N P"]:
        """Return the pixels of each patch, row-major over the grid, P = C * prod(patch_size)."""
        return patchify(images, self.config.patch_size)

    def forward(
        self, images: Float[Tensor, "B C *S"], index: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K D"]:
        """Encode images, or only the patches at `index`: those are gathered before they are embedded.

        Args:
            images: normalised pixels; another resolution than the configured one sees interpolated positions.
            index: flat positions of the patches on the grid; None means all N in row-major order.

        Returns:
            Tokens after the final norm, in the order of `index`.

        Raises:
            ValueError: for images that the patches cannot tile.
        """
        grid = self.grid_of(images)
        tokens = self._embed(images, index, grid)
        embedding = self.positions.embedding(grid, index, tokens.device)
        if embedding is not None:
            tokens = tokens + embedding
        prefix = self.config.registers
        if self.registers is not None:
            tokens = torch.cat([self.registers.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        rotation = self.positions.rotation(grid, index, tokens.device, prefix)
        out: Tensor = self.transformer(tokens, rotation)
        return out[:, prefix:]

    def _embed(self, images: Tensor, index: Tensor | None, grid: Grid) -> Float[Tensor, "B K D"]:
        if isinstance(self.stem, OverlapStem):
            seen: Tensor = self.stem(images, index, grid)
            return seen
        patches = self.patchify(images)
        tokens: Tensor = self.stem(patches if index is None else gather_tokens(patches, index))
        return tokens


def _build_stem(config: EncoderConfig) -> LinearStem | ConvStem | OverlapStem:
    if config.stem is Stem.linear:
        return LinearStem(config.in_channels, config.patch_size, config.embed_dim)
    kind = ConvStem if config.stem is Stem.conv else OverlapStem
    return kind(config.in_channels, config.patch_size, config.embed_dim, config.stem_channels, config.stem_norm)
