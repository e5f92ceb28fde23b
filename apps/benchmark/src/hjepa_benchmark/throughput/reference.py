"""A plain I-JEPA step, written from the paper: what the speed of ours is compared with.

Attention is written out, the predictor runs once for each target block with the context repeated, nothing is compiled,
and the moving average goes parameter by parameter. Tokens and sizes are those of the step beside it.

Source: Assran et al. 2023 (arXiv 2301.08243), section 3 and appendix A.
"""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hjepa_benchmark.throughput.step import synthetic_batch
from hjepa_data import normalize
from hjepa_models import grid_coordinates, sincos_positions
from hjepa_pretrain.config import PretrainConfig
from hjepa_train.precision import autocast


class PlainAttention(nn.Module):
    """softmax(Q K^T / sqrt d) V, with the weights laid out in memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        """Return the attended tokens."""
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        weights = (query @ key.transpose(-2, -1)) * (width // self.heads) ** -0.5
        mixed = (weights.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, count, width)
        out: Tensor = self.out(mixed)
        return out


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = PlainAttention(width, heads)
        hidden = int(ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        """Return the tokens after the block."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PlainEncoder(nn.Module):
    """All patches are embedded; those that are asked for enter the blocks."""

    positions: Tensor

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        one = config.hjepa.encoder
        patch = (one.patch_size[0], one.patch_size[1])
        self.embed = nn.Conv2d(one.in_channels, one.embed_dim, patch, patch)
        self.register_buffer("positions", _positions(config, one.embed_dim))
        self.blocks = nn.ModuleList(PlainBlock(one.embed_dim, one.num_heads, one.mlp_ratio) for _ in range(one.depth))
        self.norm = nn.LayerNorm(one.embed_dim, eps=1e-6)

    def forward(self, images: Float[Tensor, "B C H W"], index: Int[Tensor, "B K"] | None) -> Float[Tensor, "B K D"]:
        """Return the tokens of the patches at `index`, or of all."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        tokens = tokens if index is None else _take(tokens, index)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens)
        return out


class PlainPredictor(nn.Module):
    """Context tokens and mask tokens to the tokens of each block on its own."""

    positions: Tensor

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        one, width = config.hjepa.predictor, config.hjepa.encoder.embed_dim
        self.enter, self.leave = nn.Linear(width, one.embed_dim), nn.Linear(one.embed_dim, width)
        self.mask = nn.Parameter(torch.zeros(1, 1, one.embed_dim))
        self.register_buffer("positions", _positions(config, one.embed_dim))
        self.blocks = nn.ModuleList(PlainBlock(one.embed_dim, one.num_heads, one.mlp_ratio) for _ in range(one.depth))
        self.norm = nn.LayerNorm(one.embed_dim, eps=1e-6)

    def forward(
        self, context: Float[Tensor, "B Kc D"], seen: Int[Tensor, "B Kc"], wanted: Int[Tensor, "B M Kt"]
    ) -> Float[Tensor, "B M Kt D"]:
        """Predict every block."""
        batch, blocks, count = wanted.shape
        tokens = self.enter(context)
        tokens = tokens + _take(self.positions.expand(batch, -1, -1), seen)
        masks = self.mask + _take(self.positions.expand(batch, -1, -1), wanted.flatten(1))
        masks = masks.reshape(batch * blocks, count, -1)
        tokens = torch.cat([tokens.repeat_interleave(blocks, 0), masks], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.leave(self.norm(tokens)[:, seen.shape[1] :])
        return out.reshape(batch, blocks, count, -1)


class ReferenceStep:
    """The whole step on the first view of the run's batch, at its numbers of context and target tokens.

    Args:
        config: of the run beside it.
        context: flat positions of the visible patches [B, Kc].
        targets: flat positions of the hidden ones [B, M, Kt].
        device: where it runs.
    """

    def __init__(self, config: PretrainConfig, context: Tensor, targets: Tensor, device: torch.device) -> None:
        self._config, self._device = config, device
        self.encoder = PlainEncoder(config).to(device)
        self.predictor = PlainPredictor(config).to(device)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self._view = synthetic_batch(config, device).views[0]
        self._context, self._targets = context[: len(self._view)], targets[: len(self._view)]
        trained = [*self.encoder.parameters(), *self.predictor.parameters()]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.04)

    def forward_backward(self) -> None:
        """Loss and gradients."""
        images = normalize(self._view, self._config.data.mean, self._config.data.std)
        with autocast(self._config.trainer.precision, self._device):
            with torch.no_grad():
                whole = self.target(images, None)
                whole = F.layer_norm(whole.float(), whole.shape[-1:])
                wanted = _take(whole, self._targets.flatten(1)).reshape(*self._targets.shape, -1)
            predicted = self.predictor(self.encoder(images, self._context), self._context, self._targets)
            loss = F.smooth_l1_loss(predicted.float(), wanted)
        torch.autograd.backward(loss)

    def __call__(self) -> None:
        """Do one step."""
        self.forward_backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for online, target in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
                target.mul_(0.996).add_(online, alpha=0.004)


def _positions(config: PretrainConfig, width: int) -> Float[Tensor, "1 N D"]:
    return sincos_positions(grid_coordinates(config.hjepa.encoder.grid), width).float().unsqueeze(0)


def _take(tokens: Float[Tensor, "B N D"], index: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
