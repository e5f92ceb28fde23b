import math
import time

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from hjepa_data import ColorAugment, ColorConfig, normalize
from hjepa_data.transforms.color import _color_affine, _gaussian_blur

OFF = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "probability": 1.0}


def batch(device, count=16, size=24):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (images * 255).round().to(torch.uint8).to(device), torch.arange(count, device=device)


def augmented(device, seed=0, **fields):
    images, sample = batch(device)
    return images.float() / 255, ColorConfig(**(OFF | fields)).build(seed)(images, 0, sample, 0)


def test_nothing_changes_nothing(device):
    images, result = augmented(device)
    torch.testing.assert_close(result, images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_step_equals_torchvision(device, name):
    images, result = augmented(device, **{name: 0.4})
    draws = _draws(device)
    factor = 1 + 0.4 * (2 * draws[:, 1 + ("brightness", "contrast", "saturation").index(name)] - 1)
    assert float(factor.std()) > 0.1
    for image, value, found in zip(images, factor.tolist(), result, strict=True):
        expected = getattr(reference, f"adjust_{name}")(image, value)
        # Their weights of grey have four digits.
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def _draws(device):
    from hjepa_data.random import uniform
    from hjepa_data.transforms.color import _COLOR

    return uniform(0, _COLOR, 0, 0, torch.arange(16, device=device), n=ColorAugment._NUM_DRAWS)


def test_hue_turns_colours_and_keeps_grey(device):
    images, result = augmented(device, hue=0.3)
    luma = torch.tensor((0.299, 0.587, 0.114), device=device).view(3, 1, 1)
    inside = ((result > 0) & (result < 1)).all(1)
    change = ((images - result) * luma).sum(1).abs()
    assert float(change[inside].max()) < 1e-4
    assert float((images - result).abs().mean()) > 0.02


def test_tint_multiplies_each_channel_of_an_image(device):
    images, result = augmented(device, tint=0.5)
    gain = torch.exp(0.5 * (2 * _draws(device)[:, 9:12] - 1))
    torch.testing.assert_close(result, (images * gain[:, :, None, None]).clamp(0, 1), atol=1e-5, rtol=0)
    assert float(gain.min()) < 0.8
    assert float(gain.max()) > 1.25


def test_contrast_is_about_the_tinted_mean(device):
    images, result = augmented(device, tint=0.5, contrast=0.4)
    draws = _draws(device)
    tinted = images * torch.exp(0.5 * (2 * draws[:, 9:12] - 1))[:, :, None, None]
    factor = (1 + 0.4 * (2 * draws[:, 2] - 1))[:, None, None, None]
    luma = torch.tensor((0.299, 0.587, 0.114), device=device).view(3, 1, 1)
    mean = (tinted * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    torch.testing.assert_close(result, (factor * tinted + (1 - factor) * mean).clamp(0, 1), atol=1e-5, rtol=0)


def test_grayscale_has_three_equal_channels(device):
    images, result = augmented(device, grayscale=1.0)
    assert float((result - result.mean(1, keepdim=True)).abs().max()) < 1e-5
    torch.testing.assert_close(result[:, :1], reference.rgb_to_grayscale(images), atol=2e-3, rtol=0)


def test_steps_compose_in_their_order(device):
    images, _ = batch(device, 4)
    pixels = images.float() / 255
    config = ColorConfig(probability=1.0, grayscale=0.0, hue=0.0)
    draws = _draws(device)[:4]
    matrix, offset, _ = _color_affine(config, draws, pixels.flatten(2).mean(2))
    found = torch.baddbmm(offset, matrix, pixels.flatten(2)).view_as(pixels)
    brightness, contrast, saturation = (
        (1 + part * (2 * draws[:, 1 + i] - 1)).view(-1, 1, 1, 1) for i, part in enumerate((0.4, 0.4, 0.2))
    )
    luma = torch.tensor((0.299, 0.587, 0.114), device=device).view(1, 3, 1, 1)
    step = pixels * brightness
    mean = (step * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    step = contrast * step + (1 - contrast) * mean
    step = saturation * step + (1 - saturation) * (step * luma).sum(1, keepdim=True)
    torch.testing.assert_close(found, step, atol=1e-5, rtol=0)


def test_solarize_inverts_bright_values(device):
    images, result = augmented(device, solarize=1.0)
    torch.testing.assert_close(result, torch.where(images >= 0.5, 1 - images, images), atol=1e-6, rtol=0)


def naive_blur(image, sigma, radius):
    """A float64 sum over the kernel, pixel by pixel, mirrored at the border."""
    _, height, width = image.shape

    def mirrored(place, length):
        place = abs(place)
        return 2 * (length - 1) - place if place >= length else place

    offsets = range(-radius, radius + 1)
    weight = np.array([[math.exp(-(a * a + b * b) / (2 * sigma * sigma)) for b in offsets] for a in offsets])
    weight /= weight.sum()
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            rows = [mirrored(y + a, height) for a in offsets]
            columns = [mirrored(x + b, width) for b in offsets]
            out[:, y, x] = (image[:, rows][:, :, columns] * weight).sum((1, 2))
    return out


def test_blur_equals_a_naive_sum(device):
    images, sample = batch(device, 6, 17)
    config = ColorConfig(**(OFF | {"blur": 0.5, "blur_sigma": (0.3, 1.6)}))
    found = config.build(0)(images, 0, sample, 0).cpu().double().numpy()
    draws = _draws(device)[:6].cpu().double()
    chosen = draws[:, 6] < 0.5
    assert 0 < int(chosen.sum()) < 6
    for number in range(6):
        expected = images[number].cpu().double().numpy() / 255
        if chosen[number]:
            expected = naive_blur(expected, 0.3 + 1.3 * float(draws[number, 8]), 5)
        np.testing.assert_allclose(found[number], expected, atol=2e-6)


def test_blur_comes_before_solarization(device):
    images, blurred = augmented(device, blur=1.0)
    both = augmented(device, blur=1.0, solarize=1.0)[1]
    torch.testing.assert_close(both, torch.where(blurred >= 0.5, 1 - blurred, blurred), atol=1e-6, rtol=0)
    assert float((blurred - images).abs().max()) > 0.01


def test_the_widest_blur_is_as_wide_as_it_says(device):
    point = torch.zeros(1, 1, 41, 41, device=device)
    point[..., 20, 20] = 1
    spread = _gaussian_blur(point, torch.tensor([2.0], device=device), 2.0)[0, 0].sum(0)
    place = torch.arange(41, device=device) - 20
    assert float((spread * place**2).sum()) ** 0.5 == pytest.approx(2.0, rel=0.02)


def test_blur_equals_torchvision_and_spares_the_others(device):
    images = batch(device)[0].float() / 255
    sigma = torch.linspace(0.5, 1.5, 16, device=device)
    found = _gaussian_blur(images, sigma, 1.5)
    for image, value, blurred in zip(images, sigma.tolist(), found, strict=True):
        torch.testing.assert_close(blurred, reference.gaussian_blur(image, [11, 11], [value, value]), atol=1e-4, rtol=0)
    plain, none = augmented(device, blur=1e-9)
    torch.testing.assert_close(none, plain, atol=1e-6, rtol=0)


def test_pure_in_seed_step_sample_and_view(device):
    images, sample = batch(device)
    augment = ColorConfig().build(3)
    base = augment(images, 5, sample, 0)
    assert torch.equal(base, ColorConfig().build(3)(images, 5, sample, 0))
    parts = [augment(images[rows], 5, sample[rows], 0) for rows in (slice(0, 5), slice(5, 16))]
    torch.testing.assert_close(torch.cat(parts), base, atol=1e-6, rtol=0)
    for other in (augment(images, 6, sample, 0), augment(images, 5, sample, 1), augment(images, 5, sample + 16, 0)):
        assert float((other - base).abs().mean()) > 0.01
    assert float(base.min()) >= 0
    assert float(base.max()) <= 1


def test_clips_are_changed_as_a_whole(device):
    images, sample = batch(device)
    clips = images[:, :, None].expand(-1, -1, 3, -1, -1)
    config = ColorConfig(blur=0.5, solarize=0.5)
    flat, tube = config.build(0)(images, 0, sample, 0), config.build(0)(clips, 0, sample, 0)
    for frame in range(3):
        torch.testing.assert_close(tube[:, :, frame], flat, atol=1e-5, rtol=0)


def test_normalize(device):
    images, _ = batch(device)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = reference.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(normalize(images, mean, std), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(normalize(images.float() / 255, mean, std), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="3 channels"):
        normalize(images, (0.5,), (0.5,))


def test_wrong_input_is_refused(device):
    with pytest.raises(ValueError, match="three channels"):
        ColorConfig().build(0)(torch.zeros(2, 1, 4, 4, device=device), 0, torch.arange(2, device=device), 0)
    for fields, word in (
        ({"hue": 0.7}, "0 to 0.5 turns"),
        ({"brightness": 1.5}, "brightness=1.5"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma"),
        ({"solarize_threshold": 2.0}, "solarize_threshold"),
    ):
        with pytest.raises(ValueError, match=word):
            ColorConfig(**fields)


@pytest.mark.parametrize(("fields", "limit"), [({}, 62), ({"tint": 0.1, "blur": 0.5, "solarize": 0.2}, 79)])
def test_an_augmentation_is_few_kernels(fields, limit, launches, device):
    images, sample = batch(device)
    augment = ColorConfig(**fields).build(0)
    assert 0.8 * limit < launches(lambda: augment(images, 3, sample, 0)) <= limit
    assert launches(lambda: normalize(images)) == 1


def test_256_small_images_take_milliseconds():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        augment, sample, times = ColorConfig().build(0), torch.arange(256), []
        for step in range(20):
            begin = time.process_time()
            augment(images, step, sample, 0)
            times.append(time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    # About 2 ms on an idle core; the limit leaves room for a busy one.
    assert sorted(times)[5] < 0.012


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_blur_of_a_line_of_pixels(device, size):
    images = torch.rand(3, 3, *size, device=device)
    augment = ColorConfig(**(OFF | {"blur": 1.0})).build(0)
    blurred = augment(images, 0, torch.arange(3, device=device), 0)
    # Mirrored at the border of one pixel, nothing else is near.
    torch.testing.assert_close(blurred, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_cast(device, dtype):
    images, sample = batch(device)
    images = (images.float() / 255).to(dtype)
    augment = ColorConfig(blur=0.5).build(0)
    assert torch.equal(augment(images, 0, sample, 0), augment(images.float(), 0, sample, 0))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.bool])
def test_integers_of_unknown_range_are_refused(dtype):
    images = torch.ones(2, 3, 4, 4, dtype=dtype)
    with pytest.raises(ValueError, match=r"^images='torch.*pixels of unknown range; allowed: uint8"):
        normalize(images)
    with pytest.raises(ValueError, match=r"^images='torch.*pixels of unknown range; allowed: uint8"):
        ColorConfig().build(0)(images, 0, torch.arange(2), 0)
