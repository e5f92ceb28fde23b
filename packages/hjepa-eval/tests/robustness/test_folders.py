"""Folders with one folder a class."""

import pytest
import torch

from hjepa_eval.robustness.folders import class_folders

CLASSES = ("n01440764", "n01498041", "n02119789", "n03000000")


@pytest.fixture
def root(tmp_path):
    for name, count in (("n01498041", 3), ("n03000000", 2)):
        for number in range(count):
            path = tmp_path / "set" / name / "deep" / f"{number}.{'JPEG' if number else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes([number]))
    (tmp_path / "set" / "README.txt").write_text("no image")
    (tmp_path / "set" / "n01498041" / "notes.txt").write_text("no image")
    return tmp_path / "set"


def test_labels_are_those_of_the_training_set(root):
    found = class_folders(root, CLASSES)
    assert found.labels.tolist() == [1, 1, 1, 3, 3]
    assert found.present.tolist() == [1, 3]
    assert [path.name for path in found.paths] == ["0.png", "1.JPEG", "2.JPEG", "0.png", "1.JPEG"]
    batches = list(found.batches(lambda path: torch.tensor([path.read_bytes()[0]]), batch_size=2))
    assert torch.cat([values for values, _ in batches]).flatten().tolist() == [0, 1, 2, 0, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == [1, 1, 1, 3, 3]


def test_predictions_are_among_the_classes_of_the_set(root):
    found = class_folders(root, CLASSES)
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0], [9.0, 3.0, 8.0, 2.0]])
    assert found.among_present(scores).tolist() == [3, 1]


def test_wrong_folders_are_named(root):
    with pytest.raises(ValueError, match="no such folder"):
        class_folders(root / "nowhere", CLASSES)
    with pytest.raises(ValueError, match="n03000000"):
        class_folders(root, CLASSES[:3])
    (root.parent / "empty" / CLASSES[0]).mkdir(parents=True)
    with pytest.raises(ValueError, match="no image"):
        class_folders(root.parent / "empty", CLASSES)


def test_a_class_that_comes_twice_is_refused(root):
    with pytest.raises(ValueError, match="only 4 differ"):
        class_folders(root, (*CLASSES, CLASSES[1]))
