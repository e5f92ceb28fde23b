"""What the README says can be set, can be set."""

import re
from pathlib import Path

import pytest

from hjepa_pretrain import settings

README = Path(__file__).parents[1] / "README.md"
TABLE = README.read_text().partition("## Settings")[2].partition("## ")[0]
# Words with one value; those that list choices or stand for a path are no words to type.
WORDS = sorted(set(re.findall(r"(?<=`)trainer\.[\w.]+=[^\s`|\\]+(?=`)", TABLE)))


def test_there_are_words_to_try():
    assert len(WORDS) >= 3


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_table_is_taken(word):
    config, _ = settings.load([word])
    assert config.preset == "demo"
