"""Supervised: class labels, as a ceiling for what the same encoder learns from the same images."""

import torch
from torch import nn
from torch.nn import functional

from hjepa_models import HJEPAConfig, HJEPAOutput
from hjepa_models.initialization import initialize
from hjepa_pretrain.baselines.base import Baseline, Inputs, scored
from hjepa_pretrain.baselines.config import BaselineConfig


class Supervised(Baseline):
    """A linear classifier on the mean token of the first view, trained end to end; unlabelled images do not count."""

    def __init__(self, config: BaselineConfig, hjepa: HJEPAConfig) -> None:
        super().__init__(hjepa.encoder)
        if config.num_classes is None:
            raise ValueError(
                "baseline.num_classes=null: the images have no two classes; give labelled shards, or the number"
            )
        self.label_smoothing = config.label_smoothing
        self.classifier = nn.Linear(hjepa.encoder.embed_dim, config.num_classes)

    def init_head(self, generator: torch.Generator) -> None:
        """Fill the classifier."""
        initialize(nn.Sequential(self.classifier), generator)

    def forward(self, inputs: Inputs) -> HJEPAOutput:
        """Return the cross entropy of the labels."""
        pooled = self.encoder(inputs.views[0]).mean(1)
        logits = self.classifier(pooled).float()
        # A sum over a count that is never 0: a batch without labels has loss 0, not NaN.
        known = inputs.labels >= 0
        each = functional.cross_entropy(
            logits, inputs.labels.clamp(min=0), reduction="none", label_smoothing=self.label_smoothing
        )
        loss = (each * known).sum() / known.sum().clamp(min=1)
        return scored(loss, pooled, classes=loss)
