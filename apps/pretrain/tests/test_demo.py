import hashlib
from pathlib import Path

import numpy as np
import pytest

from hjepa_pretrain import demo
from hjepa_pretrain.demo.garments import load_garments


def test_composites_are_a_pure_function_of_split_count_and_seed():
    first, again, other = (demo.compose_demo("train", 64, seed) for seed in (3, 3, 4))
    for name in ("images", "labels", "masks", "center", "scale", "rotation", "tint", "garment", "background"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.images != other.images).mean() > 0.5


@pytest.mark.parametrize("size", [32, 64])
def test_shapes_ranges_and_balance(size):
    composites = demo.compose_demo("eval", 205, seed=0, size=size)
    assert len(composites) == 205
    assert composites.images.shape == (205, size, size, 3)
    assert composites.images.dtype == np.uint8
    assert composites.masks.shape == (205, size, size)
    counts = np.bincount(composites.labels, minlength=len(demo.CLASS_NAMES))
    assert counts.max() - counts.min() <= 1
    assert composites.masks.any(axis=(1, 2)).all()
    half = composites.scale[:, None] / 2
    assert (composites.center >= half - 1e-5).all()
    assert (composites.center <= 1 - half + 1e-5).all()


def test_the_mask_lies_where_the_factors_say():
    composites = demo.compose_demo("train", 400, seed=1)
    rows, columns = np.arange(32)[None, :, None], np.arange(32)[None, None, :]
    area = composites.masks.sum(axis=(1, 2))
    found = np.stack([(composites.masks * axis).sum(axis=(1, 2)) / area for axis in (rows, columns)], axis=1)
    # The garment's own centre of mass, carried through the stated rotation (counter-clockwise), scale and place.
    silhouettes = load_garments(demo.Split.TRAIN)[1][composites.garment]
    cells = np.stack(np.meshgrid(np.arange(28), np.arange(28), indexing="ij"), axis=-1) - 13.5
    y, x = (np.einsum("nij,ijk->kn", silhouettes, cells) / silhouettes.sum(axis=(1, 2))) / 28
    turn = np.deg2rad(composites.rotation)
    turned = np.stack([np.cos(turn) * y - np.sin(turn) * x, np.cos(turn) * x + np.sin(turn) * y], axis=1)
    expected = (composites.center + composites.scale[:, None] * turned) * 32 - 0.5
    assert np.abs(found - expected).mean() < 0.3
    assert np.corrcoef(np.sqrt(area), composites.scale)[0, 1] > 0.3


def test_outside_the_garment_the_photo_is_untouched_and_inside_it_is_covered():
    composites = demo.compose_demo("train", 300, seed=2)
    inside = np.stack([composites.images[i][composites.masks[i]].mean(axis=0) for i in range(300)]) / 255
    # Inside, colour is grey value times tint: the ratio of channels follows the tint and not the photo.
    share = inside / inside.sum(axis=1, keepdims=True)
    expected = composites.tint / composites.tint.sum(axis=1, keepdims=True)
    assert np.corrcoef(share.ravel(), expected.ravel())[0, 1] > 0.9
    grey_photos = [i for i, photo in enumerate(demo.PHOTOS[demo.Split.TRAIN]) if photo.path.endswith("grass.png")]
    on_grass = np.isin(composites.background, grey_photos)
    assert on_grass.any()
    border = composites.images[on_grass][:, 0, 0].astype(int)
    untouched = ~composites.masks[on_grass][:, :3, :3].any(axis=(1, 2))
    assert (np.ptp(border[untouched], axis=1) == 0).mean() > 0.9


def test_splits_share_neither_garments_nor_photos():
    digests = []
    for split in demo.Split:
        values, silhouettes, labels = load_garments(split)
        assert values.shape == silhouettes.shape
        assert (np.bincount(labels) == len(labels) // len(demo.CLASS_NAMES)).all()
        digests.append({hashlib.sha256(garment.tobytes()).hexdigest() for garment in values})
    assert digests[0].isdisjoint(digests[1])
    train, held_out = (set(demo.PHOTOS[split]) for split in demo.Split)
    assert train.isdisjoint(held_out)


def test_every_photo_names_its_licence_and_lies_in_an_installed_package():
    for photos in demo.PHOTOS.values():
        for photo in photos:
            assert photo.licence
            assert min(photo.open().size) >= 200


def test_the_assets_stay_below_a_megabyte():
    folder = Path(demo.__file__).parent / "assets"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    assert (folder / "LICENSE-fashion-mnist.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "field"), [(("test", 4, 0), "split="), (("train", 0, 0), "count=0"), (("eval", 4, 0, 4), "size=4")]
)
def test_wrong_input_is_refused_in_one_line(arguments, field):
    with pytest.raises(ValueError, match=field) as caught:
        demo.compose_demo(*arguments)
    assert "\n" not in str(caught.value)
