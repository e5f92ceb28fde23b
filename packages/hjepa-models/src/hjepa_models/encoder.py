"""The encoder: a vision transformer on a grid of any number of axes that never sees the patches it is not given."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import (
    as_tuple,
    check_axes,
    check_drop_path,
    check_heads,
    check_not_negative,
    check_positive,
    coerce_choice,
)
from hjepa_models.canvas import Canvas, dense_canvas, scatter_to_canvas
from hjepa_models.grid import Grid, gather_tokens, num_tokens
from hjepa_models.initialization import construct, initialize, truncated_normal_
from hjepa_models.layers.attention import AttentionBackend
from hjepa_models.layers.block import DropPathSchedule, MlpKind, Transformer, check_mlp
from hjepa_models.layers.flexi import FlexiPatchEmbed
from hjepa_models.layers.patch import CONVOLUTIONS, ConvStem, LinearStem, OverlapStem, Stem, StemNorm, patchify
from hjepa_models.layers.positions import ROTARY, GridPositions, Place, Position
from hjepa_models.layers.upsampler import PatchUpsampler, Upsampling
from hjepa_models.pretrained import PretrainedMixin


@dataclass(kw_only=True, slots=True)
class EncoderConfig:
    """Describes an encoder.

    Attributes:
        image_size: pixels per axis, (H, W) for images and (T, H, W) for clips.
        patch_size: pixels of a patch per axis, for which the stem has weights; must divide `image_size`.
        processing_patch_size: pixels of a patch for which the blocks see one token; empty means `patch_size`, another
            one needs `stem=flexi`.
        output_patch_size: pixels for which tokens can be asked for, upsampled after the last block; must divide
            `processing_patch_size`; empty means that nothing is upsampled.
        upsampling: `bilinear` or `learned` (bilinear plus a learned correction).
        upsampler_dim: hidden width of the learned correction.
        in_channels: channels of a pixel.
        embed_dim: width D of a token.
        depth: number of blocks.
        num_heads: attention heads; must divide `embed_dim`.
        mlp_ratio: hidden width of the feed-forward part over `embed_dim`.
        mlp: `mlp` (GELU) or `swiglu`.
        position: `rope` (axial rotations of queries and keys), `rope_mixed` (rotations by learned frequencies over all
            axes, per layer and head), `sincos` (fixed embeddings, added), `learned` (a table, added) or `relative` (a
            learned bias of the attention per offset and head).
        position_grid: tokens per axis that positions are counted on; empty means the encoder's own grid. Another grid
            than this one sees interpolated positions.
        rope_theta: base of the rotary frequencies; positions are counted in tokens.
        rope_legacy: rotate as the released V-JEPA 2 does, which is not relative: for its weights only.
        qk_norm: layer-norm queries and keys of each head.
        layer_scale: first value of the learned scale of each residual; None leaves it out.
        drop_path: rate at which the residuals of the last block are dropped in training, by PyTorch's global generator.
        drop_path_schedule: `linear` (earlier blocks less) or `constant` (all alike).
        registers: learned tokens without a place, prepended and stripped again.
        stem: `linear`, `flexi` (linear at any patch size, its weights resized), `conv` (convolutions inside each patch,
            never across its border) or `overlap` (convolutions over the whole image, in which hidden patches are
            blanked first).
        stem_channels: channels after each strided stage of a convolutional stem.
        stem_blocks: residual blocks of two convolutions behind each of these stages; empty means none.
        stem_norm: `none`, or `batch` after each of its convolutions, over all processes. Its running statistics follow
            all patches that are encoded (`conv`) or whole images alone (`overlap`), so that training has to encode some
            (a global level or `detached` targets do).
        activation_checkpointing: recompute blocks in the backward pass to save memory.
        attention: `auto` (the faster of the next two), `sdpa`, `explicit` (plain softmax) or `flex` (biases
            and groups inside a fused kernel on a GPU).
        init_std: deviation of the truncated normal that fills the linear maps.
    """

    image_size: tuple[int, ...] = (224, 224)
    patch_size: tuple[int, ...] = (16, 16)
    processing_patch_size: tuple[int, ...] = ()
    output_patch_size: tuple[int, ...] = ()
    upsampling: Upsampling = Upsampling.bilinear
    upsampler_dim: int = 256
    in_channels: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    mlp: MlpKind = MlpKind.mlp
    position: Position = Position.rope
    position_grid: tuple[int, ...] = ()
    rope_theta: float = 100.0
    rope_legacy: bool = False
    qk_norm: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0
    drop_path_schedule: DropPathSchedule = DropPathSchedule.linear
    registers: int = 0
    stem: Stem = Stem.linear
    stem_channels: tuple[int, ...] = (32, 64)
    stem_blocks: tuple[int, ...] = ()
    stem_norm: StemNorm = StemNorm.none
    activation_checkpointing: bool = False
    attention: AttentionBackend = AttentionBackend.auto
    init_std: float = 0.02

    def __post_init__(self) -> None:
        """Coerce lists and names, and refuse what cannot be built."""
        self.image_size = check_axes("image_size", self.image_size)
        self.patch_size = check_axes("patch_size", self.patch_size)
        for field in ("processing_patch_size", "output_patch_size", "position_grid"):
            value = as_tuple(field, getattr(self, field))
            setattr(self, field, check_axes(field, value) if value else ())
        self.stem_channels = check_axes("stem_channels", self.stem_channels)
        self.stem_blocks = as_tuple("stem_blocks", self.stem_blocks)
        self.mlp = coerce_choice(MlpKind, "mlp", self.mlp)
        self.position = coerce_choice(Position, "position", self.position)
        self.upsampling = coerce_choice(Upsampling, "upsampling", self.upsampling)
        self.drop_path_schedule = coerce_choice(DropPathSchedule, "drop_path_schedule", self.drop_path_schedule)
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
            upsampler_dim=self.upsampler_dim,
        )
        check_not_negative(registers=self.registers)
        check_drop_path("drop_path", self.drop_path)
        if self.layer_scale is not None:
            check_positive(layer_scale=self.layer_scale)
        check_image_size("image_size", self.image_size, self.patch_size)
        self._check_patch_sizes()
        if self.upsampling is Upsampling.learned and not self.output_patch_size:
            raise ValueError(
                "upsampling=learned: without output_patch_size nothing is upsampled; allowed: with an "
                "output_patch_size only; set it, or leave upsampling out"
            )
        if self.position_grid and len(self.position_grid) != len(self.patch_size):
            raise ValueError(
                f"position_grid={self.position_grid}: has other axes than patch_size={self.patch_size}; "
                "allowed: one size per axis, or empty; correct it"
            )
        if self.rope_legacy and self.position is not Position.rope:
            raise ValueError(
                f"rope_legacy=True: position={self.position} has no such rotation; allowed: position=rope; "
                "change one of them"
            )
        check_heads("encoder", self.embed_dim, self.num_heads)
        check_mlp("encoder", self.mlp, self.embed_dim, self.mlp_ratio)
        check_position("encoder", self.position, self.embed_dim, self.num_heads, len(self.patch_size))
        plain = self.stem in (Stem.linear, Stem.flexi)
        for field, unset in (("stem_norm", StemNorm.none), ("stem_blocks", ())):
            if plain and getattr(self, field) != unset:
                raise ValueError(
                    f"{field}={getattr(self, field)}: stem={self.stem} has no convolutions; allowed: {unset}; "
                    "use stem=conv or overlap"
                )
        counts = all(isinstance(count, int) and count >= 0 for count in self.stem_blocks)
        if self.stem_blocks and (not counts or len(self.stem_blocks) != len(self.stem_channels)):
            raise ValueError(
                f"stem_blocks={self.stem_blocks}: needs one count of blocks for each of stem_channels="
                f"{self.stem_channels}; allowed: e.g. {(1,) * len(self.stem_channels)}, or empty; correct it"
            )
        if not plain and len(self.patch_size) not in CONVOLUTIONS:
            raise ValueError(
                f"stem={self.stem}: no convolution has {len(self.patch_size)} axes; allowed: 1 to 3 axes; "
                "use stem=linear"
            )

    def _check_patch_sizes(self) -> None:
        processing, output = self.processing_patch, self.output_patch
        if processing != self.patch_size:
            check_image_size("image_size", self.image_size, processing)
            if self.stem is not Stem.flexi:
                raise ValueError(
                    f"processing_patch_size={processing}: stem={self.stem} has weights for patch_size="
                    f"{self.patch_size} only; allowed: equal sizes, or any with stem=flexi; change one of them"
                )
        if len(output) != len(processing) or any(p % o for p, o in zip(processing, output, strict=True)):
            raise ValueError(
                f"output_patch_size={output}: does not divide the processing patch size {processing}; "
                "allowed: a divisor per axis, e.g. all 1; change one of them"
            )

    @property
    def processing_patch(self) -> Grid:
        """Pixels per axis of what is one token for the blocks."""
        return self.processing_patch_size or self.patch_size

    @property
    def output_patch(self) -> Grid:
        """Pixels per axis of an output token; the processing patch where nothing is upsampled."""
        return self.output_patch_size or self.processing_patch

    @property
    def grid(self) -> Grid:
        """Tokens per axis that the blocks see."""
        return tokens_per_axis(self.image_size, self.processing_patch)

    @property
    def output_grid(self) -> Grid:
        """Tokens per axis after upsampling."""
        return tokens_per_axis(self.image_size, self.output_patch)

    @property
    def num_patches(self) -> int:
        """Number of tokens N of the grid."""
        return num_tokens(self.grid)

    def build(self, *, seed: int = 0, device: torch.device | str | None = None) -> "Encoder":
        """Return the encoder, its weights drawn from `seed`; on the device "meta" it has no storage yet."""
        return construct(lambda: Encoder(self), seed, device)


def tokens_per_axis(image_size: tuple[int, ...], patch_size: tuple[int, ...]) -> Grid:
    """Return the grid of an image that patches tile."""
    return tuple(size // patch for size, patch in zip(image_size, patch_size, strict=True))


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
    if position not in (*ROTARY, Position.sincos):
        return
    rotary = position in ROTARY
    width = embed_dim // num_heads if rotary else embed_dim
    name = "embed_dim / num_heads" if rotary else "embed_dim"
    if width < 2 * axes or (rotary and width % 2):
        raise ValueError(
            f"{owner}.{name}={width}: too narrow or odd for position={position} on {axes} axes; "
            f"allowed: even, at least {2 * axes}; use fewer heads, a larger embed_dim or position=learned"
        )


class Encoder(nn.Module, PretrainedMixin):
    """Vision transformer that returns one normalised token for each patch it is given."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.stem = _build_stem(config)
        self.registers = nn.Parameter(torch.empty(1, config.registers, dim)) if config.registers else None
        self.positions = grid_positions(config, dim, config.num_heads, config.depth)
        self.transformer = Transformer(
            dim,
            config.depth,
            config.num_heads,
            mlp=config.mlp,
            mlp_ratio=config.mlp_ratio,
            qk_norm=config.qk_norm,
            layer_scale=config.layer_scale,
            drop_path=config.drop_path,
            drop_path_schedule=config.drop_path_schedule,
            attention=config.attention,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.upsampler = None
        if config.output_patch_size:
            self.upsampler = PatchUpsampler(dim, config.upsampling, config.upsampler_dim)

    @property
    def grid(self) -> Grid:
        """Tokens per axis that the blocks see at the configured image size."""
        return self.config.grid

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator."""
        initialize(self, generator, self.config.init_std)
        self.positions.init_weights(generator, self.config.init_std)
        if self.registers is not None:
            truncated_normal_(self.registers, self.config.init_std, generator)
        if self.upsampler is not None:
            self.upsampler.init_weights(generator)

    def grid_of(self, images: Float[Tensor, "B C *S"], processing_patch_size: Grid | None = None) -> Grid:
        """Return the tokens per axis of these images.

        Raises:
            ValueError: for another number of axes or channels, a size that the patch does not divide, or a patch size
                that the stem has no weights for.
        """
        config = self.config
        if images.ndim != 2 + len(config.patch_size) or images.shape[1] != config.in_channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: do not fit the encoder; "
                f"allowed: [batch, {config.in_channels}, {', '.join(['size'] * len(config.patch_size))}]; "
                f"check axes and channels"
            )
        patch = processing_patch_size or config.processing_patch
        if config.stem is not Stem.flexi and patch != config.patch_size:
            raise ValueError(
                f"processing_patch_size={patch}: stem={config.stem} has weights for {config.patch_size} only; "
                "allowed: that size; build the encoder with stem=flexi for any other"
            )
        check_image_size("images", tuple(images.shape[2:]), patch)
        return tokens_per_axis(tuple(images.shape[2:]), patch)

    def patchify(self, images: Float[Tensor, "B C *S"], patch_size: Grid | None = None) -> Float[Tensor, "B N P"]:
        """Return the pixels of each patch, row-major over the grid, P = C * prod(patch_size)."""
        return patchify(images, patch_size or self.config.processing_patch)

    def forward(
        self,
        images: Float[Tensor, "B C *S"],
        index: Int[Tensor, "B K"] | None = None,
        *,
        processing_patch_size: Grid | None = None,
        output_patch_size: Grid | None = None,
        output_index: Int[Tensor, "B O"] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Encode images, or only the patches at `index`: those are gathered before they are embedded.

        Args:
            images: normalised pixels; another resolution than the configured one sees interpolated positions.
            index: flat positions of the patches on the grid; None means all N in row-major order.
            processing_patch_size: pixels per axis of a token for the blocks; None means the configured ones.
            output_patch_size: pixels per axis of a returned token, upsampled after the last block; None returns the
                tokens of the blocks. Needs a configuration with an `output_patch_size` (any), so that there is an
                upsampler, unless it is the processing patch.
            output_index: flat positions on the output grid, the only ones that are upsampled; None means all of them.

        Returns:
            Tokens after the final norm, in the order of `index`, or of `output_index` where they are upsampled. With
            `index`, places near which nothing was encoded are 0.

        Raises:
            ValueError: for images that the patches cannot tile, or sizes that the encoder was not built for.
        """
        tokens = self.encode(images, index, processing_patch_size=processing_patch_size)[1]
        processing = processing_patch_size or self.config.processing_patch
        if output_patch_size is None or (self.upsampler is None and output_patch_size == processing):
            if output_index is None:
                return tokens
            if index is None:
                return gather_tokens(tokens, output_index)
            grid = tokens_per_axis(tuple(images.shape[2:]), processing)
            return gather_tokens(scatter_to_canvas(tokens, index, grid).values, output_index)
        check_image_size("images", tuple(images.shape[2:]), output_patch_size)
        grid, output_grid = (tokens_per_axis(tuple(images.shape[2:]), p) for p in (processing, output_patch_size))
        canvas = dense_canvas(tokens, grid) if index is None else scatter_to_canvas(tokens, index, grid)
        return self.upsample(canvas, output_grid, output_index)

    def upsample(
        self, canvas: Canvas, output_grid: Grid, output_index: Int[Tensor, "B O"] | None = None
    ) -> Float[Tensor, "B O D"]:
        """Return tokens of the output grid, all or those at `output_index`, from what is known on a canvas.

        Raises:
            ValueError: for an encoder that was built without an output patch size.
        """
        if self.upsampler is None:
            raise ValueError(
                "output_patch_size: the encoder has no upsampler; allowed: an EncoderConfig with output_patch_size; "
                "build it with one"
            )
        out: Tensor = self.upsampler(canvas, output_grid, output_index)
        return out

    def encode(
        self,
        images: Float[Tensor, "B C *S"],
        index: Int[Tensor, "B K"] | None = None,
        *,
        processing_patch_size: Grid | None = None,
    ) -> tuple[Float[Tensor, "B R D"], Float[Tensor, "B K D"]]:
        """Return what `forward` does without upsampling, the register tokens before it."""
        tokens, places = self._enter(images, index, processing_patch_size)
        out: Tensor = self.transformer(tokens, places)
        return out[:, : self.config.registers], out[:, self.config.registers :]

    def scales(self, images: Float[Tensor, "B C *S"], count: int) -> list[Float[Tensor, "B N D"]]:
        """Encode whole images and return their tokens, and then `count` maps of the stem, from coarse to fine.

        Args:
            images: normalised pixels.
            count: maps of the stem, each [B, places, its channels]; more than 0 needs `stem=overlap`.
        """
        if not count:
            return [self(images)]
        assert isinstance(self.stem, OverlapStem)
        grid = self.grid_of(images)
        *maps, embedded = self.stem.maps(images, None, grid)
        tokens: Tensor = self.transformer(*self._place(embedded, None, grid))
        return [tokens[:, self.config.registers :], *maps[: -count - 1 : -1]]

    @torch.no_grad()
    def attention_maps(
        self, images: Float[Tensor, "B C *S"], index: Int[Tensor, "B K"] | None = None
    ) -> list[Float[Tensor, "B H T T"]]:
        """Return the attention weights of every block, to be looked at: T tokens, the registers before the patches.

        They are computed explicitly whatever the backend; rows sum up to 1.
        """
        return self.transformer.attention_maps(*self._enter(images, index, None))

    def _enter(
        self, images: Tensor, index: Tensor | None, processing_patch_size: Grid | None
    ) -> tuple[Float[Tensor, "B T D"], list[Place]]:
        """Return the tokens that enter the first block and their places."""
        grid = self.grid_of(images, processing_patch_size)
        tokens = self._embed(images, index, grid, processing_patch_size or self.config.processing_patch)
        return self._place(tokens, index, grid)

    def _place(self, tokens: Tensor, index: Tensor | None, grid: Grid) -> tuple[Float[Tensor, "B T D"], list[Place]]:
        tokens = self.positions.add(tokens, grid, index)
        if self.registers is not None:
            tokens = torch.cat([self.registers.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        return tokens, self.positions.places(grid, index, tokens.device, self.config.registers)

    def _embed(self, images: Tensor, index: Tensor | None, grid: Grid, patch_size: Grid) -> Float[Tensor, "B K D"]:
        if isinstance(self.stem, OverlapStem):
            seen: Tensor = self.stem(images, index, grid)
            return seen
        patches = self.patchify(images, patch_size)
        patches = patches if index is None else gather_tokens(patches, index)
        sizes = (patch_size,) if isinstance(self.stem, FlexiPatchEmbed) else ()
        tokens: Tensor = self.stem(patches, *sizes)
        return tokens


def grid_positions(config: EncoderConfig, embed_dim: int, num_heads: int, depth: int) -> GridPositions:
    """Return the positions of a transformer on the encoder's grid, its own or the predictor's."""
    reference = config.position_grid or config.grid
    return GridPositions(config.position, embed_dim, num_heads, depth, config.rope_theta, reference, config.rope_legacy)


def _build_stem(config: EncoderConfig) -> LinearStem | FlexiPatchEmbed | ConvStem | OverlapStem:
    if config.stem in (Stem.linear, Stem.flexi):
        simple = LinearStem if config.stem is Stem.linear else FlexiPatchEmbed
        return simple(config.in_channels, config.patch_size, config.embed_dim)
    kind = ConvStem if config.stem is Stem.conv else OverlapStem
    channels, norm, blocks = config.stem_channels, config.stem_norm, config.stem_blocks
    return kind(config.in_channels, config.patch_size, config.embed_dim, channels, norm, blocks)
