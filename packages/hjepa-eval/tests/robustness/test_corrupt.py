"""The 15 corruptions: against statistics of a public implementation, and what they depend on."""

import json
import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hjepa_eval.robustness.corrupt import corrupt
from hjepa_eval.robustness.draws import Draws
from hjepa_eval.robustness.maps import area_matrix, gaussian_matrix, outside, zoom_matrix
from hjepa_eval.robustness.severity import PARAMETERS, SEVERITIES, Corruption, Strength, strength_of
from hjepa_eval.robustness.weather import _frost

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "reference.json").read_text())
FIXED = (
    Corruption.defocus_blur, Corruption.zoom_blur, Corruption.brightness, Corruption.contrast, Corruption.pixelate,
    Corruption.jpeg_compression,
)  # fmt: skip
DRAWN = tuple(name for name in Corruption if name not in (*FIXED, "frost") and f"{name}/1" in REFERENCE)


def _script():
    spec = spec_from_file_location("make_reference", HERE / "make_reference.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()
PICTURE = torch.from_numpy(SCRIPT.picture()).permute(2, 0, 1)


def _changed(name, severity, count, seed=0, **options):
    images = PICTURE.expand(count, -1, -1, -1)
    return corrupt(images, name, severity, seed=seed, strength="imagenet", **options)


def _statistics(changed):
    return SCRIPT.statistics(changed.permute(0, 2, 3, 1).numpy(), SCRIPT.picture())


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", FIXED)
def test_what_is_not_random_is_that_of_the_public_package(name, severity):
    found, expected = _statistics(_changed(name, severity, 1)), REFERENCE[f"{name}/{severity}"]
    # Levels: flat parts fall to either side of a whole one, and libjpeg rounds its cosine transforms earlier.
    tolerance = 0.25
    assert torch.allclose(torch.tensor(found["cells"]), torch.tensor(expected["cells"]), rtol=0, atol=tolerance)
    for key in ("mean", "deviation", "change"):
        assert found[key] == pytest.approx(expected[key], abs=0.15)


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", DRAWN)
def test_what_is_random_has_the_statistics_of_the_public_package(name, severity):
    found, expected = _statistics(_changed(name, severity, 32)), REFERENCE[f"{name}/{severity}"]
    # A cloud differs much from draw to draw, a trail with its angle.
    cloud = name is Corruption.fog
    assert found["mean"] == pytest.approx(expected["mean"], abs=5 if cloud else 1.5)
    assert found["change"] == pytest.approx(expected["change"], rel=0.06)
    assert found["deviation"] == pytest.approx(expected["deviation"], rel=0.03)
    tolerance = 18 if cloud else 8
    assert torch.allclose(torch.tensor(found["cells"]), torch.tensor(expected["cells"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_drawn_frost_has_the_statistics_of_photographed_frost(severity):
    found, expected = _statistics(_changed("frost", severity, 256)), REFERENCE[f"frost/{severity}"]
    # The five photographs differ by 30 levels, so that 256 draws against 128 leave some.
    assert found["mean"] == pytest.approx(expected["mean"], abs=8)
    assert found["change"] == pytest.approx(expected["change"], rel=0.12)
    assert found["deviation"] == pytest.approx(expected["deviation"], rel=0.05)
    assert torch.allclose(torch.tensor(found["cells"]), torch.tensor(expected["cells"]), rtol=0, atol=14)


@pytest.mark.parametrize(("scale", "side"), [(1, 128), (0.3, 64), (0.2, 32)])
def test_every_octave_of_frost_holds_as_much_and_the_finest_what_shrinking_folds_into_it(scale, side):
    """From the coarsest, the photographs have 0.2 0.1 0.1 0.1 0.2 0.2; at a fifth of the size the finest has 0.5."""
    frost = _frost(torch.zeros(48, 3, side, side), scale, Draws(0, torch.arange(48), "frost", device="cpu")).mean(1)
    power = torch.fft.fft2(frost - frost.mean((1, 2), keepdim=True)).abs().square()
    frequency = torch.fft.fftfreq(side) * side
    radius = torch.hypot(frequency[:, None], frequency).long()
    shares = [(power[:, radius >= f] / power.sum((1, 2))[:, None]).sum(1).mean().item() for f in (side // 4, side // 8)]
    octaves = math.log2(side) - 1 - math.log2(scale)
    assert shares[0] == pytest.approx((1 - math.log2(scale)) / octaves, abs=0.06)
    assert shares[1] - shares[0] == pytest.approx(1 / octaves, abs=0.06)


@pytest.mark.parametrize(("strength", "side"), [("cifar", 32), ("small", 64), ("imagenet", 112)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_zooms_are_those_of_the_published_code(strength, side, severity):
    """Its steps by numpy.arange and its zoom by scipy, pixel by pixel."""
    ends = {"imagenet": (1.11, 1.16, 1.21, 1.26, 1.31)}.get(strength, (1.06, 1.11, 1.16, 1.21, 1.26))
    step, count = PARAMETERS[Strength(strength)][Corruption.zoom_blur][severity - 1]
    factors = np.arange(1, ends[severity - 1], step)
    assert len(factors) == count
    picture = np.resize(SCRIPT.picture().transpose(2, 0, 1), (3, side, side))
    x, total = picture / 255, picture / 255
    for factor in factors:
        kept = math.ceil(side / factor)
        first = (side - kept) // 2
        zoomed = ndimage.zoom(x[:, first : first + kept, first : first + kept], (1, factor, factor), order=1)
        trim = (zoomed.shape[1] - side) // 2
        total = total + zoomed[:, trim : trim + side, trim : trim + side]
    found = corrupt(torch.from_numpy(picture)[None], "zoom_blur", severity, strength=strength)[0].numpy()
    assert np.abs(found - total / (count + 1) * 255 + 0.5).max() < 0.6


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_transform_is_that_of_the_published_code(severity):
    """Its affine map and its displacements by scipy, on the same draws."""
    side = 32
    x = torch.nn.functional.interpolate(PICTURE[None].float(), size=(side, side)).byte()
    samples = torch.tensor([5])
    draws = Draws(0, samples, Corruption.elastic_transform, severity, device="cpu")
    size, smooth, affine = (
        side * part for part in PARAMETERS[Strength.cifar][Corruption.elastic_transform][severity - 1]
    )
    centre, third = side // 2, side // 3
    corners = np.array([[centre + third] * 2, [centre + third, centre - third], [centre - third] * 2], float)
    moved = corners + draws.uniform(-affine, affine, 3, 2)[0].double().numpy()
    back = np.linalg.solve(np.c_[moved, np.ones(3)], corners)
    rows, columns = np.mgrid[:side, :side].astype(float)
    from_x, from_y = np.moveaxis(np.stack((columns, rows, np.ones_like(rows)), -1) @ back, -1, 0)
    dy, dx = (
        size * ndimage.gaussian_filter(one.double().numpy(), smooth, mode="reflect", truncate=3) if smooth else 0 * rows
        for one in draws.uniform(-1, 1, 2, side, side)[0]
    )
    for channel, found in zip(
        x[0].double().numpy(), corrupt(x, "elastic_transform", severity, samples=samples)[0], strict=True
    ):
        turned = ndimage.map_coordinates(channel, (from_y, from_x), order=1, mode="mirror")
        expected = ndimage.map_coordinates(turned, (rows + dy, columns + dx), order=1, mode="reflect")
        assert np.abs(found.numpy() - expected + 0.5).max() < 0.6


@pytest.mark.parametrize("name", Corruption)
def test_each_image_depends_on_its_number_and_nothing_else_of_the_batch(name):
    images = torch.randint(0, 256, (5, 3, 33, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([7, 2, 900, 0, 5])
    state = torch.random.get_rng_state()
    together = corrupt(images, name, 3, samples=numbers, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert together.dtype is torch.uint8
    assert together.shape == images.shape
    assert not torch.equal(together, images)
    for i in (0, 3):
        alone = corrupt(images[i : i + 1], name, 3, samples=numbers[i : i + 1], seed=4)
        assert torch.equal(alone[0], together[i])
    if name in FIXED:
        assert torch.equal(corrupt(images, name, 3, seed=5), together)
    else:
        for other in ({"samples": numbers, "seed": 5}, {"samples": numbers + 1, "seed": 4}):
            assert not torch.equal(corrupt(images, name, 3, **other), together)
        same = corrupt(images[:1].expand(2, -1, -1, -1), name, 3, samples=torch.tensor([1, 2]))
        assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("strength", Strength)
@pytest.mark.parametrize("name", Corruption)
def test_severity_five_changes_more_than_severity_one(name, strength):
    side = {"cifar": 32, "small": 64, "imagenet": 112}[strength]
    images = torch.nn.functional.interpolate(PICTURE[None].float(), size=(side, side)).to(torch.uint8)
    images = images.expand(2, -1, -1, -1)
    assert strength_of(side) is strength
    assert len(PARAMETERS[strength][name]) == len(SEVERITIES)
    change = [(corrupt(images, name, s).double() - images).abs().mean() for s in (1, 5)]
    if name is Corruption.elastic_transform:  # its published severities trade size for roughness
        assert min(change) > 1
    else:
        assert change[1] > change[0]


def test_glass_copies_pixels_as_the_published_loop_does():
    """The naive loop over pixels with numpy's semantics, on the same draws."""
    from hjepa_eval.robustness.blur import glass_blur

    reach, rounds, side = 3, 2, 20
    image = torch.arange(3 * side * side).view(1, 3, side, side) % 251 / 255
    samples = torch.tensor([3])
    found = glass_blur(image, (0, reach, rounds), Draws(0, samples, "glass", device="cpu"))
    draws = Draws(0, samples, "glass", device="cpu")
    naive = (image[0] * 255).round()
    for _ in range(rounds):
        dy, dx = (draws.integers(-reach, reach, side * side)[0].view(side, side) for _ in range(2))
        for row in range(side - reach, reach, -1):
            for column in range(side - reach, reach, -1):
                naive[:, row, column] = naive[:, row + dy[row, column], column + dx[row, column]]
    assert torch.equal((found[0] * 255).round(), naive)
    assert not torch.equal(naive, (image[0] * 255).round())


@given(size=st.integers(1, 40), at=st.integers(-200, 200), border=st.sampled_from(["nearest", "reflect", "mirror"]))
@settings(max_examples=60, deadline=None)
def test_positions_outside_come_back_inside(size, at, border):
    found = int(outside(torch.tensor(at), size, border))
    assert 0 <= found < size
    if 0 <= at < size:
        assert found == at


@pytest.mark.parametrize(
    "matrix",
    [gaussian_matrix(20, 7.0, 4.0, "reflect"), gaussian_matrix(20, 0.4, 4.0, "nearest"), zoom_matrix(20, 1.3),
     area_matrix(20, 7)],
)  # fmt: skip
def test_maps_keep_what_is_constant(matrix):
    assert torch.allclose(matrix.sum(dim=1), torch.ones(len(matrix)), atol=1e-5)
    assert bool((matrix >= 0).all())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((PICTURE[None], "rain", 1), "corruption=rain"),
        ((PICTURE[None], "fog", 6), "severity=6"),
        ((PICTURE[None].float(), "fog", 1), "uint8"),
        ((PICTURE[None, :, :8], "fog", 1), "too small"),
    ],
)
def test_wrong_input_is_named(arguments, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        corrupt(*arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="samples"):
        corrupt(PICTURE[None], "fog", 1, samples=torch.arange(2))


def test_nothing_in_nothing_out():
    assert corrupt(PICTURE[None][:0], "snow", 2).shape == (0, 3, 64, 64)


def test_a_severity_is_a_number_whatever_its_type():
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = corrupt(images, "fog", 2)
    for severity in (2.0, np.int64(2), torch.tensor(2)):
        assert torch.equal(corrupt(images, "fog", severity), expected)
    with pytest.raises(ValueError, match=r"samples torch\.float32"):
        corrupt(images, "fog", 2, samples=torch.zeros(2))
