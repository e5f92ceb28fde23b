import pytest
import torch
from torch import nn

from hjepa_eval import BlockFeatures, FeatureName, extract, level_features, open_encoder, patch_tokens, pool_tokens
from hjepa_eval.extraction.blocks import find_blocks


class Tower(nn.Module):
    """Three blocks on tokens behind a class token, and a final norm."""

    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def test_all_blocks_and_poolings_come_from_one_pass(device):
    torch.manual_seed(0)
    tower = Tower().to(device)
    x = torch.randn(2, 5, 4, device=device)
    features = BlockFeatures(tower, blocks=(-1, 0, "output", "blocks.1"), poolings=("mean", "cls", "concat"))
    found = features(x)
    assert tower.calls == 1
    assert [name.level for name in found][::3] == ["block2", "block0", "output", "blocks.1"]
    assert len(found) == 12
    first = tower.blocks[0](x)
    second = tower.blocks[1](first)
    third = tower.blocks[2](second)
    for level, tokens in (("block0", first), ("blocks.1", second), ("block2", third), ("output", tower.norm(third))):
        mean, cls = tokens[:, 1:].mean(1), tokens[:, 0]
        for pooling, expected in (("mean", mean), ("cls", cls), ("concat", torch.cat((cls, mean), 1))):
            torch.testing.assert_close(found[FeatureName(level=level, pooling=pooling)], expected)
    assert not any(part._forward_hooks for part in tower.modules())


def test_the_last_block_with_the_final_norm_is_the_output(device):
    tower = Tower().to(device)
    found = BlockFeatures(tower, blocks=(2, "output"), norm=True)(torch.randn(2, 5, 4, device=device))
    torch.testing.assert_close(*found.values())


class Stripped(Tower):
    """Its output has lost the class token."""

    def forward(self, x):
        return super().forward(x)[:, 1:]


@pytest.mark.parametrize("name", ["cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_blocks_that_the_class_token_has_not_joined_keep_all_their_tokens(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, img_size=32, depth=1, embed_dim=32, num_heads=2, num_classes=0).eval()
    assert model.num_prefix_tokens == 1
    kept = []
    model.blocks[0].register_forward_hook(lambda *passed: kept.append(passed[-1]))
    (found,) = BlockFeatures(model, blocks=(0,))(torch.rand(2, 3, 32, 32)).values()
    assert kept[0].shape == (2, 4, 32)
    torch.testing.assert_close(found, kept[0].mean(1))
    with pytest.raises(ValueError, match="no class token"):
        BlockFeatures(model, blocks=(0,), poolings=("cls",))(torch.rand(2, 3, 32, 32))


def test_an_output_without_the_prefix_keeps_all_its_tokens(device):
    tower, x = Stripped().to(device), torch.randn(2, 5, 4, device=device)
    whole, output = BlockFeatures(tower, blocks=(2, "output"), norm=True)(x).values()
    torch.testing.assert_close(whole, output)
    torch.testing.assert_close(output, tower(x).mean(1))


def test_a_prefix_that_nobody_names_is_not_averaged_with_the_patches():
    class Silent(Stripped):
        num_prefix_tokens = None

    tower, x = Silent(), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"block2: 5 tokens, of which the module returns 4; give num_prefix_tokens=1"):
        BlockFeatures(tower, blocks=(-1,))(x)
    found = {n: BlockFeatures(tower, blocks=(-1, "output"), norm=True, num_prefix_tokens=n)(x) for n in (0, 1)}
    block, output = found[1].values()
    torch.testing.assert_close(block, output)
    assert not torch.allclose(*found[0].values())


def test_a_wrapper_says_what_its_module_says(device):
    tower, x = Tower().to(device), torch.randn(2, 5, 4, device=device)
    wrapped = nn.Module()
    wrapped.module, wrapped.forward = tower, tower.forward
    (expected,), (found,) = (BlockFeatures(one, blocks=(-1,))(x).values() for one in (tower, wrapped))
    assert torch.equal(found, expected)


def test_hooks_are_gone_after_an_error(device):
    tower = Tower().to(device)
    with pytest.raises(RuntimeError):
        BlockFeatures(tower, blocks=(0,))(torch.randn(2, 5, 3, device=device))
    assert not any(part._forward_hooks for part in tower.modules())


def test_extract_names_blocks_and_puts_their_module_in_eval_mode(device):
    tower = Tower().to(device)
    modes = []
    tower.norm.register_forward_hook(lambda part, *_: modes.append(part.training))
    batches = [(torch.randn(3, 5, 4), torch.arange(3)), (torch.randn(2, 5, 4), torch.arange(2))]
    sets = extract(BlockFeatures(tower, blocks=(0, -1)), batches, branch="online")
    assert list(sets) == ["block0/mean", "block2/mean"]
    assert str(sets["block0/mean"].name) == "branch=online level=block0 pooling=mean"
    assert len(sets["block2/mean"]) == 5
    assert modes == [False, False]
    assert tower.training


def test_maps_and_vectors_are_pooled_by_the_same_rule():
    image = torch.arange(24.0).view(1, 2, 3, 4)
    torch.testing.assert_close(pool_tokens(image, "mean"), image.mean((2, 3)))
    assert patch_tokens(image).shape == (1, 12, 2)
    vector = torch.ones(2, 3)
    assert pool_tokens(vector, "mean") is vector
    found = BlockFeatures(nn.Flatten(), poolings=("mean", "cls"))(image)
    assert list(found) == [FeatureName(level="output", pooling="none")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": (3,)}, "3 blocks"),
        ({"blocks": ("head",)}, "no such submodule"),
        ({"blocks": ()}, "at least one"),
        ({"poolings": ("max",)}, "no such pooling"),
        ({"poolings": ("cls",), "num_prefix_tokens": 0}, "no class token"),
        ({"num_prefix_tokens": 5}, "beyond the prefix"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        BlockFeatures(Tower(), **arguments)(torch.randn(2, 5, 4))
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="no list called blocks"):
        BlockFeatures(nn.Linear(2, 2), blocks=(0,))


def test_sources_are_modules_timm_names_and_folders(tmp_path):
    module = nn.Linear(2, 2)
    assert open_encoder(module) is module
    assert open_encoder(tmp_path, load_folder=lambda folder: nn.Linear(len(folder.parts), 1)).in_features == len(
        tmp_path.parts
    )
    with pytest.raises(ValueError, match="load_folder"):
        open_encoder(tmp_path)
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="neither a path nor a timm model"):
        open_encoder("vit_gigantic_of_nobody")
    encoder = open_encoder("test_vit")
    found = BlockFeatures(encoder, blocks=(0, -1), poolings=("concat",))(torch.zeros(1, 3, 160, 160))
    assert {name.level for name in found} == {"block0", f"block{len(encoder.blocks) - 1}"}


class Hierarchy(nn.Module):
    calls = 0

    def all_features(self, images, pool, branch):
        assert pool == "none"
        self.calls += 1
        scale = {"target": 1, "online": 2}[branch]
        return {level: scale * images * (level + 1) for level in range(2)} | {"global": images.sum(1)}


def test_levels_of_both_branches_come_with_their_names_from_one_pass_for_all_poolings():
    model, images = Hierarchy(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    features = level_features(model, branches=("target", "online"), poolings=("mean", "flatten"))
    sets = extract(features, [(images, torch.arange(2))])
    assert model.calls == 2
    levels = [f"{level}/{pooling}" for level in range(2) for pooling in ("mean", "flatten")] + ["global/none"]
    assert list(sets) == [f"{branch}/{level}" for branch in ("target", "online") for level in levels]
    torch.testing.assert_close(sets["online/1/mean"].values, 4 * images.mean(1))
    torch.testing.assert_close(sets["target/1/flatten"].values, 2 * images.flatten(1))
    torch.testing.assert_close(sets["target/global/none"].values, images.sum(1))
    assert model.training
    with pytest.raises(ValueError, match="poolings"):
        level_features(model, poolings=("max",))


@pytest.mark.parametrize(("pairs", "branch"), [([], "online"), ([("encoder", "target encoder")], "target")])
def test_levels_are_of_the_branch_that_a_model_has(pairs, branch):
    class Averaged(Hierarchy):
        def ema_pairs(self):
            return pairs

    assert {name.branch for name in level_features(Averaged())(torch.ones(2, 3, 4))} == {branch}
    asked = level_features(Averaged(), branches=("target",))
    assert {name.branch for name in asked(torch.ones(2, 3, 4))} == {"target"}


class HierarchicalTower(Tower):
    def all_features(self, images, pool, branch):
        tokens = self(images)
        return {0: tokens, "global": tokens[:, 0]}


def test_levels_and_blocks_come_from_one_pass():
    tower, x = HierarchicalTower(), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    features = BlockFeatures(tower, blocks=(0, -1), poolings=("mean", "cls"), levels=level_features(tower))
    sets = extract(features, [(x, torch.arange(2))], branch="online")
    assert tower.calls == 1
    blocks = [f"block{block}/{pooling}" for block in (0, 2) for pooling in ("mean", "cls")]
    assert list(sets) == ["target/0/mean", "target/global/none", *blocks]
    assert {sets[block].name.branch for block in blocks} == {"online"}
    torch.testing.assert_close(sets["target/0/mean"].values, tower(x).mean(1))
    torch.testing.assert_close(sets["block0/cls"].values, tower.blocks[0](x)[:, 0])
    with pytest.raises(ValueError, match=r"'output'.*leave it out"):
        BlockFeatures(tower, levels=level_features(tower))


class Staged(nn.Module):
    """Two stages of two blocks on maps with channels last, as Swin has them."""

    output_fmt = "NHWC"

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])}) for _ in range(2)
        )

    def forward(self, x):
        for stage in self.stages:
            for block in stage["blocks"]:
                x = block(x)
        return x


def test_blocks_of_all_stages_are_counted_and_channels_may_be_last(device):
    tower = Staged().to(device)
    x = torch.randn(2, 3, 5, 4, device=device)
    found = BlockFeatures(tower, blocks=(0, -1, "output"))(x)
    assert [name.level for name in found] == ["block0", "block3", "output"]
    first, last, output = found.values()
    torch.testing.assert_close(first, tower.stages[0]["blocks"][0](x).mean((1, 2)))
    torch.testing.assert_close(last, tower(x).mean((1, 2)))
    assert torch.equal(output, last)
    (other,) = BlockFeatures(tower, channels_last=False)(x).values()
    torch.testing.assert_close(other, tower(x).mean((2, 3)))


def test_blocks_of_a_swin_are_those_of_its_stages():
    timm = pytest.importorskip("timm")
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 2), num_heads=(1, 2), num_classes=0
    ).eval()
    assert find_blocks(swin) == [swin.layers[0].blocks[0], *swin.layers[1].blocks]
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (last,) = BlockFeatures(swin, blocks=(-1,), norm=True)(images).values()
        torch.testing.assert_close(last, swin.forward_features(images).mean((1, 2)))


def test_a_pooling_that_no_block_needs_is_checked_too():
    for poolings in (("max",), "mean"):
        with pytest.raises(ValueError, match="no such pooling"):
            BlockFeatures(nn.Linear(2, 2), poolings=poolings)


def test_a_timm_model_without_such_weights_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"source=resnet10t\.nope"):
        open_encoder("resnet10t.nope")
