"""Fixtures: the same small images as a folder and as data sets of others."""

import pytest


@pytest.fixture(scope="session")
def pets(tmp_path_factory, jpeg):
    """31 images in three class folders: number n is <class>/n.jpg."""
    folder = tmp_path_factory.mktemp("pets")
    for number in range(31):
        place = folder / ("cat", "dog", "emu")[number % 3]
        place.mkdir(exist_ok=True)
        (place / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


@pytest.fixture(scope="session")
def rows(jpeg):
    """Build 31 rows of the same images as a data set of Hugging Face."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"pixels": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "emu"])})
    images = [{"bytes": jpeg(number), "path": None} for number in range(31)]
    return datasets.Dataset.from_dict({"pixels": images, "kind": [n % 3 for n in range(31)]}, features=features)
