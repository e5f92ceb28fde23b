"""SimCLR: two views of an image find one another among the views of the other images."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from hjepa_models import GlobalConfig, HJEPAConfig, HJEPAOutput
from hjepa_models.distributed import all_gather_rows, rank
from hjepa_models.global_level import GlobalLevel
from hjepa_pretrain.baselines.base import Baseline, Inputs, scored
from hjepa_pretrain.baselines.config import BaselineConfig


class SimCLR(Baseline):
    """The views are those of the run, `data.views` of them; the first two are compared.

    Source:
        Chen et al. 2020 (arXiv 2002.05709), section 2 and equation 1.
    """

    def __init__(self, config: BaselineConfig, hjepa: HJEPAConfig) -> None:
        super().__init__(hjepa.encoder)
        self.temperature = config.temperature
        head = GlobalConfig(hidden_dim=config.hidden_dim, depth=2, out_dim=config.out_dim)
        self.projector = GlobalLevel(head, hjepa.encoder.embed_dim)

    def init_head(self, generator: torch.Generator) -> None:
        """Fill the projector."""
        self.projector.init_weights(generator)

    def forward(self, inputs: Inputs) -> HJEPAOutput:
        """Return NT-Xent over the images of all processes."""
        pooled = self.encoder(torch.cat(list(inputs.views[:2]))).mean(1).unflatten(0, (2, -1))
        loss = nt_xent(self.projector(pooled), self.temperature)
        return scored(loss, pooled[0], contrast=loss)


def nt_xent(z: Float[Tensor, "2 B P"], temperature: float) -> Float[Tensor, ""]:
    r"""Return the normalised-temperature cross entropy of two views.

    $$-\frac{1}{2B} \sum_i \ln \frac{e^{s_{i,j(i)}}}{\sum_{k \ne i} e^{s_{ik}}}$$

    over all 2B rows i, with j(i) the other view of i's image, s the cosine divided by the temperature, and k over both
    views of the images of all processes.

    Args:
        z: embeddings of both views, the rows of this process.
        temperature: of the softmax.

    Returns:
        The mean over this process's rows.

    Source:
        Chen et al. 2020 (arXiv 2002.05709), equation 1.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = functional.normalize(z.float(), dim=-1)
        first, second = (all_gather_rows(view) for view in z)
        own = torch.arange(z.shape[1], device=z.device) + rank() * z.shape[1]
        everyone = torch.cat([first, second])
        losses = []
        for view, (self_start, other_start) in zip(z, ((0, len(first)), (len(first), 0)), strict=True):
            logits = view @ everyone.T / temperature
            itself = functional.one_hot(own + self_start, len(everyone)).bool()
            losses.append(functional.cross_entropy(logits.masked_fill(itself, -torch.inf), own + other_start))
        return torch.stack(losses).mean()
