"""Weather: snow, frost, fog, brightness. Images are [B, 3, H, W] in [0, 1]."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hjepa_eval.robustness.draws import Draws
from hjepa_eval.robustness.maps import Images, separable, trail_blur, zoom_matrix

_GRAY = (0.299, 0.587, 0.114)
# Of each photograph of frost that the published code lays over images: mean colour of its crops, their deviation from
# it, and the deviation within one.
_PHOTOGRAPHS = (
    (0.30, 0.58, 0.64, 0.04, 0.06),
    (0.77, 0.79, 0.83, 0.03, 0.08),
    (0.77, 0.79, 0.83, 0.03, 0.08),
    (0.56, 0.62, 0.67, 0.03, 0.10),
    (0.39, 0.44, 0.49, 0.05, 0.13),
)


def snow(x: Images, parameters: tuple[float, float, float, float, float, float, float], draws: Draws) -> Images:
    """Flakes of zoomed, thresholded noise that fall along a trail, on a whitened image.

    The parameters are: mean and deviation of the noise, zoom, threshold, radius and deviation of the trail in pixels,
    and what is kept of the image.
    """
    mean, deviation, zoom, threshold, radius, sigma, kept = parameters
    height, width = x.shape[-2:]
    flakes = mean + deviation * draws.normal(1, height, width)
    flakes = separable(flakes, zoom_matrix(height, zoom), zoom_matrix(width, zoom))
    flakes = torch.where(flakes < threshold, 0.0, flakes.clamp(0, 1))
    flakes = trail_blur(flakes, radius, sigma, draws.uniform(-135, -45))
    gray = torch.einsum("bchw,c->bhw", x, x.new_tensor(_GRAY))[:, None]
    whitened = kept * x + (1 - kept) * torch.maximum(x, gray * 1.5 + 0.5)
    return whitened + flakes + flakes.flip((-2, -1))


def frost(x: Images, parameters: tuple[float, float, float], draws: Draws) -> Images:
    """Image and frost added: (weight of the image, weight of the frost, scale of the photographs of frost).

    The published code lays crops of five photographs over the images. Here the frost is drawn: noise with the mean
    colour, the deviations and the spectrum of one of those photographs.
    """
    kept, weight, scale = parameters
    return kept * x + weight * _frost(x, scale, draws)


def fog(x: Images, parameters: tuple[float, float], draws: Draws) -> Images:
    """A plasma fractal added: (thickness, decay of the fractal), then scaled back to the brightest value."""
    thickness, decay = parameters
    height, width = x.shape[-2:]
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    cloud = plasma(2 ** math.ceil(math.log2(max(height, width))), decay, draws)[:, None, :height, :width]
    return (x + thickness * cloud) * brightest / (brightest + thickness).clamp_min(1e-12)


def brightness(x: Images, added: float, draws: Draws) -> Images:
    """The V of HSV raised; hue and saturation stay, so that all channels grow by one factor."""
    value = x.amax(dim=1, keepdim=True)
    raised = (value + added).clamp(0, 1)
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-12)), raised)


def plasma(size: int, decay: float, draws: Draws) -> Float[Tensor, "B n n"]:
    """Diamond-square fractal on a torus, scaled to [0, 1].

    A centre is the mean of the four corners of its square, an edge's middle that of its four neighbours; noise of
    decay^(-2 level) is added to both.

    Args:
        size: n, a power of two.
        decay: How much smoother each level is.
        draws: Streams of the images.

    Source:
        Fournier, Fussell and Carpenter 1982, "Computer rendering of stochastic models".
    """
    corner = draws.uniform(0, 1, 1, 1) * 0
    amplitude = 1.0
    while corner.shape[1] < size:
        n = corner.shape[1]
        centre_noise, row_noise, column_noise = (amplitude * draws.uniform(-1, 1, n, n) for _ in range(3))
        below, right = corner.roll(-1, 1), corner.roll(-1, 2)
        centre = (corner + below + right + below.roll(-1, 2)) / 4 + centre_noise
        row = (corner + right + centre + centre.roll(1, 1)) / 4 + row_noise
        column = (corner + below + centre + centre.roll(1, 2)) / 4 + column_noise
        even = torch.stack((corner, row), dim=3).flatten(2)
        odd = torch.stack((column, centre), dim=3).flatten(2)
        corner = torch.stack((even, odd), dim=2).flatten(1, 2)
        amplitude /= decay**2
    low, high = corner.amin(dim=(1, 2), keepdim=True), corner.amax(dim=(1, 2), keepdim=True)
    return (corner - low) / (high - low).clamp_min(1e-12)


def _frost(x: Images, scale: float, draws: Draws) -> Images:
    height, width = x.shape[-2:]
    photograph = x.new_tensor(_PHOTOGRAPHS)[draws.integers(0, len(_PHOTOGRAPHS))][..., None, None]
    texture = torch.zeros(len(x), 1, height, width, device=x.device)
    # Every octave holds as much; shrinking without a filter folds those that are lost into the finest that is left.
    amplitude, cells = math.sqrt(1 - math.log2(scale)), (height, width)
    while min(cells) > 1:
        noise = draws.normal(1, *cells)
        texture += amplitude * F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False)
        amplitude, cells = 1.0, (cells[0] // 2, cells[1] // 2)
    deviation, mean = torch.std_mean(texture, dim=(2, 3), keepdim=True)
    color = photograph[:, :3] + photograph[:, 3:4] * draws.normal(1, 1, 1)
    return (color + photograph[:, 4:] * (texture - mean) / deviation).clamp(0, 1)
