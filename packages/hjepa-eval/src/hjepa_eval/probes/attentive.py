"""Attentive probe: a query that attends to all patch tokens, behind none or some blocks of self-attention."""

from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hjepa_eval.probes.accuracy import check_finite, check_known, count_classes, split, top1
from hjepa_eval.probes.heads import Candidate, HeadOptimizer, HeadTraining, best_candidate, train_heads


def _training() -> HeadTraining:
    return HeadTraining(
        learning_rates=(3e-4, 1e-3, 3e-3),
        weight_decays=(0.01, 0.1),
        epochs=20,
        batch_size=256,
        optimizer=HeadOptimizer.adamw,
        warmup=0.1,
    )


@dataclass(kw_only=True, slots=True)
class AttentiveProbeConfig:
    """What an attentive probe is made of and how it is trained.

    Attributes:
        blocks: Attention blocks: the last is cross-attention by one learned query, those before it self-attention.
            V-JEPA takes 1, V-JEPA 2 takes 4.
        num_heads: Attention heads; None: one for each 64 dimensions, at least 1, and fewer where that divides no width.
        mlp_ratio: Hidden width of the MLPs, in widths of the tokens.
        training: How the heads are trained and chosen.
    """

    blocks: int = 1
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    training: HeadTraining = field(default_factory=_training)

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks}: at least 1, the cross-attention; 1 and 4 are usual")
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(f"num_heads={self.num_heads}: at least 1, or None for one for each 64 dimensions")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio={self.mlp_ratio}: above 0; 4 is usual")


class AttentiveHead(nn.Module):
    """Tokens [B, N, D] to logits [B, C]: pre-norm self-attention blocks, cross-attention by one query, a linear layer.

    Args:
        width: D.
        num_classes: C.
        config: Blocks, heads and MLPs.
        generator: Draws the weights (truncated normal of deviation 0.02; biases and the query's residual start at 0).

    Source:
        V-JEPA (arXiv 2404.08471), appendix on the attentive probe; V-JEPA 2 (arXiv 2506.09985), section 5.
    """

    def __init__(self, width: int, num_classes: int, config: AttentiveProbeConfig, generator: torch.Generator) -> None:
        super().__init__()
        heads = config.num_heads or max(n for n in range(1, max(1, width // 64) + 1) if width % n == 0)
        if width % heads:
            raise ValueError(f"num_heads={heads}: it does not divide the width {width}; choose a divisor")
        hidden = round(config.mlp_ratio * width)
        # Layers draw their weights from the global generator when they are made; on meta they draw nothing.
        with torch.device("meta"):
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width, heads, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(config.blocks - 1)
            )
            self.query = nn.Parameter(torch.empty(1, 1, width))
            self.norm = nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
            self.mlp_norm = nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            self.classifier = nn.Linear(width, num_classes)
        self.to_empty(device="cpu")
        with torch.no_grad():
            for part in self.modules():
                if isinstance(part, nn.LayerNorm):
                    part.reset_parameters()
            for name, value in self.named_parameters():
                if value.ndim > 1:
                    nn.init.trunc_normal_(value, std=0.02, generator=generator)
                elif name.endswith("bias"):
                    value.zero_()

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C"]:
        """Logits."""
        for block in self.blocks:
            tokens = block(tokens)
        keys = self.norm(tokens)
        query = self.query.expand(len(tokens), -1, -1)
        found = query + self.attention(query, keys, keys, need_weights=False)[0]
        found = found + self.mlp(self.mlp_norm(found))
        logits: Tensor = self.classifier(found[:, 0])
        return logits


class AttentiveProbe:
    """The best of some attentive heads, trained at once, chosen on a held-out part of *train*.

    Attributes:
        candidates: Every head with its held-out accuracy, after ``fit``.
        chosen: The head with the highest one, after ``fit``.
    """

    def __init__(self, config: AttentiveProbeConfig | None = None) -> None:
        self.config = AttentiveProbeConfig() if config is None else config
        self.candidates: list[Candidate] = []
        self.chosen: Candidate | None = None
        self._head: AttentiveHead | None = None
        self._device = torch.device("cpu")

    def fit(
        self,
        tokens: Float[Tensor, "n N D"],
        labels: Int[Tensor, " n"],
        num_classes: int | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Train all heads on one part of these samples, choose on the other, and train the chosen one on all.

        Args:
            tokens: Patch tokens, wherever they fit and in any float type; batches are moved to the device.
            labels: Their classes, 0 and up.
            num_classes: Number of classes; None: the largest label + 1.
            device: Where the heads are trained.

        Returns:
            The probe itself.

        Raises:
            ValueError: Where shapes disagree, a label is unknown, there are fewer than two samples, tokens are not
                finite, or all heads diverge.
        """
        if tokens.ndim != 3 or labels.shape != tokens.shape[:1] or len(labels) < 2 or not tokens.shape[2]:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} and labels {tuple(labels.shape)}: tokens must be [n, N, D] of at "
                "least two samples, with one label a sample"
            )
        check_known(labels)
        check_finite(tokens, "tokens")
        labels = labels.cpu().long()
        training, self._device = self.config.training, torch.device(device)
        classes = count_classes(labels, num_classes)
        kept, held = split(len(labels), training.held_out, training.seed)
        grid = training.grid()
        heads = self._train(tokens, labels, classes, grid, kept)
        self.candidates = []
        for head, (rate, decay) in zip(heads, grid, strict=True):
            self._head = head
            logits = self._logits(tokens, held)
            score = top1(logits.argmax(dim=1), labels[held]) if bool(logits.isfinite().all()) else -torch.inf
            self.candidates.append(Candidate(features="tokens", learning_rate=rate, weight_decay=decay, held_out=score))
        best = best_candidate(self.candidates, training)
        self.chosen, self._head = self.candidates[best], heads[best]
        if training.refit:
            (self._head,) = self._train(tokens, labels, classes, [grid[best]], torch.arange(len(labels)))
        return self

    def predict(self, tokens: Float[Tensor, "m N D"]) -> Int[Tensor, " m"]:
        """Classes of tokens.

        Args:
            tokens: Patch tokens of the same kind as those of ``fit``.

        Returns:
            The class with the largest logit for each sample, on the CPU.

        Raises:
            RuntimeError: Before ``fit``.
            ValueError: Where tokens have another width or are not finite.
        """
        if self._head is not None and (tokens.ndim != 3 or tokens.shape[2] != self._head.query.shape[2]):
            raise ValueError(f"tokens {tuple(tokens.shape)}: fitted on [n, N, {self._head.query.shape[2]}]")
        check_finite(tokens, "tokens")
        return self._logits(tokens, torch.arange(len(tokens))).argmax(dim=1)

    def accuracy(self, tokens: Float[Tensor, "m N D"], labels: Int[Tensor, " m"]) -> float:
        """Share of samples that are classified rightly, in [0, 1].

        Args:
            tokens: Test tokens.
            labels: Their classes.

        Returns:
            Top-1 accuracy. A class that ``fit`` never saw counts as an error.
        """
        return top1(self.predict(tokens), labels.cpu())

    def _train(
        self, tokens: Tensor, labels: Tensor, classes: int, grid: list[tuple[float, float]], samples: Tensor
    ) -> list[AttentiveHead]:
        seed = self.config.training.seed
        heads = [
            AttentiveHead(tokens.shape[2], classes, self.config, torch.Generator().manual_seed(seed)).to(self._device)
            for _ in grid
        ]

        def loss(batch: Tensor) -> Tensor:
            x, y = self._on_device(tokens, batch), labels[batch].to(self._device)
            return torch.stack([F.cross_entropy(head(x), y) for head in heads])

        train_heads(heads, grid, loss, samples, self.config.training)
        for head in heads:
            head.eval()
        return heads

    def _logits(self, tokens: Tensor, samples: Tensor) -> Tensor:
        if self._head is None:
            raise RuntimeError("the probe is not fitted yet: call fit(tokens, labels) first")
        with torch.no_grad():
            parts = torch.split(samples, self.config.training.batch_size)
            return torch.cat([self._head(self._on_device(tokens, part)).cpu() for part in parts])

    def _on_device(self, tokens: Tensor, samples: Tensor) -> Tensor:
        return tokens.detach()[samples.to(tokens.device)].to(self._device, torch.float32)
