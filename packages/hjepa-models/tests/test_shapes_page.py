"""The page that follows a batch from the pixel to the loss says what the code does."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from hjepa_models import Pooling, PyramidConfig, coarsen, encoder_config, max_levels, num_tokens, pool_canvas
from hjepa_models.canvas import Canvas
from hjepa_models.pooling import check_levels, pooling_grid

PAGE = Path(__file__).parents[3] / "docs" / "architecture.md"
PICTURE = PAGE.parent / "images" / "architecture.svg"
NAMES = {"B": "base", "L": "large", "H": "huge"}
ROW = re.compile(
    r"^\| ViT-(?P<size>[BLH])/(?P<patch>\d+) \| (?P<image>\d+) \| (?P<grid>\d+×\d+) \| (?P<grid_levels>\d+) \| "
    r"(?P<grid_tokens>[\d →]+) \| (?P<sequence_levels>\d+) \| (?P<sequence_tokens>[\d →]+) \| (?P<refused>.+) \|$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def page() -> str:
    assert PAGE.is_file(), f"{PAGE} is missing: run these tests from a checkout of the repository"
    return PAGE.read_text(encoding="utf-8")


def test_the_examples_of_the_page_run(page):
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    assert len(blocks) == page.count("```python\n") > 8
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        # Empty lines put the block where it stands, so that a traceback names the page's own line.
        source = "\n" * page.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, str(PAGE), "exec"), namespace)


def test_the_table_of_configurations_has_the_numbers_of_the_code(page):
    table = page.split("## How many levels a grid admits")[1]
    rows = [row.groupdict() for row in ROW.finditer(table)]
    assert len(rows) == table.count("\n| ViT-") == 4
    for row in rows:
        size = int(row["image"])
        grid = encoder_config(f"vit_{NAMES[row['size']]}_patch{row['patch']}", image_size=(size, size)).grid
        assert row["grid"] == "×".join(map(str, grid))
        for pooling in (Pooling.grid, Pooling.sequence):
            most, laid = max_levels(grid, pooling), pooling_grid(grid, pooling)
            tokens = [num_tokens(coarsen(laid, level)) for level in range(most)]
            assert (row[f"{pooling}_levels"], row[f"{pooling}_tokens"]) == (str(most), " → ".join(map(str, tokens)))
        refused = re.fullmatch(r"level (\d+): drops (\d+)", row["refused"])
        if refused is None:
            assert (row["refused"], tokens[-1]) == ("none", 1)
            continue
        level, dropped = map(int, refused.groups())
        assert (level, dropped) == (most, num_tokens(grid) % 2**most)
        with pytest.raises(ValueError, match="use fewer levels or pad=true"):
            check_levels(grid, level + 1, Pooling.sequence, pad=False)
        padded = PyramidConfig(levels=level + 1, pooling="sequence", pad=True).build(grid, 8, device="meta")
        assert len(padded.projection) == level + 1


def test_the_table_of_pooled_paths_has_the_numbers_of_the_code(page, device):
    canvas = Canvas(torch.zeros(1, 196, 1, device=device), torch.ones(1, 196, device=device), (14, 14))
    for pooling in Pooling:
        levels = [pool_canvas(canvas, level, pooling) for level in range(3)]
        shown = [
            f"{'×'.join(map(str, level.grid))} = {level.values.shape[1]}" if len(level.grid) > 1 else f"{level.grid[0]}"
            for level in levels
        ]
        assert f"| `{pooling}` | {' | '.join(shown)} |" in page


def test_the_picture_stands_alone_and_shows_the_shapes_of_the_page(page):
    assert f"](images/{PICTURE.name})" in page
    source = PICTURE.read_text(encoding="utf-8")
    assert len(source.encode()) < 60_000
    root = ET.fromstring(source)
    links = {value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")}
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"@import|@font-face|url\((?!#)", source)
    shown = " ".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))
    on_the_path = ("B×3×224×224", "B×49×768", "B×4·35×768", "B×196×768", "B×140×768", "2B×196×768", "2B×128")
    levels = ("14×14 = 196", "7×7 = 49", "4×4 = 16", "sequence: 196", "sequence: 98", "sequence: 49")
    assert [shape for shape in (*on_the_path, *levels) if shape not in shown] == []
