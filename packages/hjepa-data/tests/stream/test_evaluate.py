import io

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa_data import EvalConfig, ShardSource, WorkerConfig, write_shards


@pytest.mark.parametrize("world", [1, 2, 3, 8, 60])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_each_sample_exactly_once(shards, world, batch):
    source = ShardSource(shards)
    config = EvalConfig(batch_size=batch, size=(8, 8))
    seen, sizes = [], []
    for rank in range(world):
        stream = config.build(source, rank=rank, world_size=world)
        batches = list(stream)
        assert len(batches) == len(stream)
        assert all(len(one) <= batch for one in batches)
        for one in batches:
            assert torch.equal(one.labels, one.sample % 7)
            seen += one.sample.tolist()
        sizes.append(stream.num_samples)
    assert seen == list(range(53))
    assert max(sizes) - min(sizes) <= 1


def test_passes_and_workers_are_equal(shards, device):
    source = ShardSource(shards)
    plain = EvalConfig(batch_size=10, size=(8, 8)).build(source)
    workers = EvalConfig(batch_size=10, size=(8, 8), workers=WorkerConfig(count=2)).build(source)
    passes = [torch.cat([batch.to(device).views[0] for batch in stream]) for stream in (plain, plain, workers)]
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[0], passes[2])


def test_full_crop_of_the_same_size_is_the_image_itself(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    source = ShardSource(write_shards(list(pixels), tmp_path))
    (batch,) = EvalConfig(size=(32, 32), crop_fraction=1.0).build(source)
    assert np.array_equal(batch.views[0].numpy(), pixels.transpose(0, 3, 1, 2))
    assert batch.crops == ()


def test_crop_is_centred(tmp_path):
    image = np.zeros((100, 200, 3), dtype=np.uint8)
    image[25:75, 75:125] = 255
    source = ShardSource(write_shards([image], tmp_path))
    (batch,) = EvalConfig(size=(50, 50), crop_fraction=0.5).build(source)
    assert int(batch.views[0].min()) == 255
    (whole,) = EvalConfig(size=(100, 100), crop_fraction=1.0).build(source)
    assert torch.equal(whole.views[0][0, 0, :, 24:76] > 127, torch.from_numpy(image[:, 74:126, 0] > 127))


def test_damaged_images_are_counted_and_missing(tmp_path, jpeg):
    images = [jpeg(n) for n in range(10)]
    images[4] = images[4][:40]
    stream = EvalConfig(batch_size=4, size=(8, 8)).build(ShardSource(write_shards(images, tmp_path)))
    for _ in range(2):
        assert torch.cat([batch.sample for batch in stream]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        assert sum(stream.skipped.values()) == 1


def test_some_samples_of_all_parts(shards):
    source = ShardSource(shards)
    config = EvalConfig(batch_size=4, size=(8, 8), max_samples=10)
    whole = torch.cat([batch.sample for batch in config.build(source)])
    assert all(place * 53 // 10 <= number < (place + 1) * 53 // 10 for place, number in enumerate(whole.tolist()))
    parts = [torch.cat([b.sample for b in config.build(source, rank=r, world_size=3)]) for r in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_wrong_fields_are_refused(shards):
    for fields, word in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"size": (8,)}, "a height and a width"),
        ({"crop_fraction": 0.0}, "crop_fraction=0.0"),
        ({"interpolation": "cubic"}, "allowed: bilinear, bicubic"),
        ({"max_samples": 0}, "max_samples=0"),
    ):
        with pytest.raises(ValueError, match=word):
            EvalConfig(**fields)
    with pytest.raises(ValueError, match="rank=3"):
        EvalConfig().build(ShardSource(shards), rank=3, world_size=3)


def test_exif_turns_the_image_upright(tmp_path):
    upright = np.zeros((40, 60, 3), dtype=np.uint8)
    upright[:20] = 255
    for orientation, undo in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(upright).transpose(undo).save(buffer, format="JPEG", exif=exif, quality=95)
        source = ShardSource(write_shards([buffer.getvalue()], tmp_path / str(orientation)))
        (batch,) = EvalConfig(size=(40, 60), crop_fraction=1.0).build(source)
        top, bottom = batch.views[0][0, :, :18].float().mean(), batch.views[0][0, :, 22:].float().mean()
        assert (top, bottom) == (pytest.approx(255, abs=3), pytest.approx(0, abs=3))
