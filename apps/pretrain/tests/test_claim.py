"""One program at a time in the folder of a run."""

import pytest

from hjepa_pretrain.claim import LOCK_FILE, claim
from hjepa_pretrain.settings import SettingsError


def test_a_folder_that_cannot_be_written_is_named_with_what_helps(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()  # root may write what is read-only to others
    with (
        pytest.raises(SettingsError, match=rf"run\.dir={tmp_path}: cannot be written .*; go on in a copy"),
        claim(tmp_path),
    ):
        pytest.fail("claimed")
