"""MAE: the pixels of hidden patches from the features of the visible ones."""

import torch
from torch import nn
from torch.nn import functional

from hjepa_models import HJEPAConfig, HJEPAOutput
from hjepa_models.grid import gather_tokens
from hjepa_models.initialization import initialize
from hjepa_models.predictor import Predictor
from hjepa_pretrain.baselines.base import Baseline, Inputs, scored
from hjepa_pretrain.baselines.config import BaselineConfig


class MAE(Baseline):
    """The masks are those of the run: `masks=random` hides single patches, as the paper does.

    The decoder is the H-JEPA's predictor with a map to pixels; it sees visible tokens and positions of hidden ones.

    Source:
        He et al. 2021 (arXiv 2111.06377), sections 3 and 4.1 (normalised pixels); facebookresearch/mae divides by the
        deviation without bias, which the paper leaves open.
    """

    masked = True

    def __init__(self, config: BaselineConfig, hjepa: HJEPAConfig) -> None:
        super().__init__(hjepa.encoder)
        self.normalize_pixels = config.normalize_pixels
        self.decoder = Predictor(hjepa.predictor, hjepa.encoder)
        # Pixels come from the decoder's width: a map to the encoder's in between would be a bottleneck.
        self.decoder.output = nn.Identity()  # type: ignore[assignment]
        patch = hjepa.encoder.processing_patch
        self.pixels = nn.Linear(hjepa.predictor.embed_dim, hjepa.encoder.in_channels * patch[0] * patch[1])

    def init_head(self, generator: torch.Generator) -> None:
        """Fill the decoder and the map to pixels."""
        self.decoder.init_weights(generator)
        initialize(nn.Sequential(self.pixels), generator, self.encoder.config.init_std)

    def forward(self, inputs: Inputs) -> HJEPAOutput:
        """Return the mean squared error over the hidden patches of the first view."""
        images = inputs.views[0]
        context_index, target_index = inputs.context_index, inputs.target_index
        assert context_index is not None
        assert target_index is not None
        seen = self.encoder(images, context_index)
        guess = self.pixels(self.decoder(seen, context_index, target_index).flatten(1, 2))
        wanted = gather_tokens(self.encoder.patchify(images), target_index.flatten(1)).float()
        if self.normalize_pixels:
            variance, mean = torch.var_mean(wanted, dim=-1, keepdim=True)
            wanted = (wanted - mean) * (variance + 1e-6).rsqrt()
        loss = functional.mse_loss(guess.float(), wanted)
        return scored(loss, seen.mean(1), pixels=loss)
