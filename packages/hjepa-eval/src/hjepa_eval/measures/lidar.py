"""LiDAR: the rank of what separates images from one another beyond how far the views of one image differ."""

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_eval.probes.accuracy import check_finite


def lidar(z: Float[Tensor, "n q D"], *, delta: float = 1e-4, eps: float = 1e-7) -> Float[Tensor, ""]:
    """LiDAR: the exponential of the entropy of the eigenvalues of the discriminant matrix of images and their views.

    Sigma_b = mean_i (mu_i - mu)(mu_i - mu)^T,   Sigma_w = mean_ij (z_ij - mu_i)(z_ij - mu_i)^T + delta I,
    lambda = eigenvalues of Sigma_w^-1/2 Sigma_b Sigma_w^-1/2,   p_i = lambda_i / sum(lambda) + eps,
    LiDAR = exp(-sum_i p_i log p_i)

    It lies between 1 and min(n - 1, D), but for eps. delta is absolute: features of another scale get another number.

    Args:
        z: Features of q views of each of n images (a view is a draw of the training augmentation); computed in float64.
            The paper takes n = 1000 and q = 50, and n must exceed D for a full rank.
        delta: Added to the within-image covariance.
        eps: Added to each p.

    Returns:
        The score, a float64 scalar on the device of z. Features without any difference between images score 1.

    Raises:
        ValueError: Where z is not [n, q, D] with at least two images and two views or not finite, or delta is not
            above 0.

    Source:
        Thilak et al. 2024 (arXiv 2312.04000v1), equations 1 to 4.

    Example:
        >>> images = torch.cat((torch.eye(3), -torch.eye(3)))
        >>> round(lidar(images[:, None].expand(6, 2, 3)).item(), 4)
        3.0
    """
    if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] < 2 or z.shape[2] < 1:
        raise ValueError(
            f"z of shape {tuple(z.shape)}: LiDAR needs features [n, q, D] of two images and views at least"
        )
    if delta <= 0:
        raise ValueError(f"delta={delta}: above 0, or the within-image covariance has no inverse; 1e-4 is usual")
    values = z.detach().double()
    check_finite(values, "z")
    centres = values.mean(dim=1)
    between = centres - centres.mean(dim=0)
    within = (values - centres[:, None]).flatten(0, 1)
    covariance = within.T @ within / len(within)
    variance, directions = torch.linalg.eigh(covariance)
    # Sigma_w and its inverse root have the same directions; delta shifts every variance.
    whitened = between @ directions * (variance.clamp_min(0) + delta).rsqrt()
    eigenvalues = torch.linalg.svdvals(whitened).square()
    # Of the D eigenvalues only min(n, D) are not 0 by construction.
    eigenvalues = torch.nn.functional.pad(eigenvalues, (0, values.shape[2] - len(eigenvalues)))
    p = eigenvalues / eigenvalues.sum().clamp_min(torch.finfo(torch.float64).tiny) + eps
    entropy: Tensor = torch.special.entr(p).sum()
    return entropy.exp()
