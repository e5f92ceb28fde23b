"""The page about masks says what the code does."""

import re
from pathlib import Path

import pytest
import torch

from hjepa_data.masks import HierarchicalMaskConfig, MultiBlockConfig, ReleasedMaskConfig

PAGE = Path(__file__).parents[4] / "docs" / "masks.md"
ROW = re.compile(
    r"^\| (?P<law>multi-block|released, batch \d+) \| (?P<tokens>\d+) \| (?P<lost>\d*)[^|]*\| (?P<rows>.+) \|$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def page():
    assert PAGE.is_file(), f"{PAGE} is missing: run these tests from a checkout of the repository"
    return PAGE.read_text(encoding="utf-8")


def test_the_examples_of_the_page_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})


def test_the_table_of_rows_has_the_numbers_of_the_code(page, device):
    rows = [row.groupdict() for row in ROW.finditer(page)]
    assert len(rows) == 4
    whole = ReleasedMaskConfig(batch_size=1).num_context_tokens
    for row in rows:
        released = row["law"].startswith("released")
        config = ReleasedMaskConfig(batch_size=int(row["law"].split()[-1])) if released else MultiBlockConfig()
        assert config.num_context_tokens == int(row["tokens"])
        if released:
            assert round(100 * (1 - config.num_context_tokens / whole)) == int(row["lost"])
        sampler, samples = config.build(1), torch.arange(32, device=device)
        context = torch.cat([sampler(step, samples).context for step in range(300)])
        found = torch.bincount(context.flatten(), minlength=196).view(14, 14).sum(1) / (14 * len(context))
        expected = torch.tensor([float(number) for number in row["rows"].split(" | ")], device=device)
        assert float((found[[0, 4, 9, 12, 13]] - expected).abs().max()) < 0.02


def test_the_messages_of_the_page_are_those_of_the_code(page):
    for fields in ({"level": 2}, {"context_tokens": 50}):
        with pytest.raises(ValueError, match="allowed") as caught:
            HierarchicalMaskConfig(**fields)
        assert f"\n{caught.value}\n" in page
