import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from hjepa_models.converters import encoder_from_vjepa2, from_vjepa2
from hjepa_models.layers.positions import GridPositions, Position, rotate


def naive_rotation(x, places):
    """Turn [tokens, width] as the released code: the frequencies of an axis are tiled over its channels."""
    width = x.shape[-1]
    share = 2 * ((width // 3) // 2)
    columns = [x[:, channel] for channel in range(width)]
    out = list(columns)
    for axis in range(3):
        for channel in range(share):
            here = axis * share + channel
            angle = places[:, axis] * 10_000.0 ** -((channel % (share // 2)) / (share // 2))
            other = -columns[here + 1] if channel % 2 == 0 else columns[here - 1]
            out[here] = columns[here] * angle.cos() + other * angle.sin()
    return torch.stack(out, dim=-1)


def places_of(index, grid):
    """Return (t, h, w) of flat positions."""
    _, height, width = grid
    return torch.stack([index // (height * width), index // width % height, index % width], dim=-1).double()


class NaiveAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, places):
        return torch.stack([self.one(*pair) for pair in zip(x, places, strict=True)])

    def one(self, x, places):
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        width = query.shape[-1] // self.heads
        mixed = []
        for head in range(self.heads):
            q, k, v = (part[:, head * width : (head + 1) * width] for part in (query, key, value))
            logits = naive_rotation(q, places) @ naive_rotation(k, places).T / math.sqrt(width)
            weights = torch.exp(logits)
            mixed.append(weights / weights.sum(-1, keepdim=True) @ v)
        return self.proj(torch.cat(mixed, dim=-1))


class NaiveMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))


class NaiveBlock(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = NaiveAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = NaiveMlp(dim, hidden)

    def forward(self, x, places):
        x = x + self.attn(self.norm1(x), places)
        return x + self.mlp(self.norm2(x))


class NaivePatchEmbed(nn.Module):
    def __init__(self, dim, tubelet, patch):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (tubelet, patch, patch), (tubelet, patch, patch))


class NaiveEncoder(nn.Module):
    def __init__(self, dim, depth, heads, hidden, tubelet, patch):
        super().__init__()
        self.patch_embed = NaivePatchEmbed(dim, tubelet, patch)
        self.blocks = nn.ModuleList(NaiveBlock(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, clips, index=None):
        x = self.patch_embed.proj(clips)
        grid = x.shape[2:]
        x = x.flatten(2).mT
        if index is None:
            index = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        x = torch.stack([row[chosen] for row, chosen in zip(x, index, strict=True)])
        for block in self.blocks:
            x = block(x, places_of(index, grid))
        return self.norm(x)


class NaivePredictor(nn.Module):
    def __init__(self, dim, width, depth, heads, mask_tokens):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, width)) for _ in range(mask_tokens))
        self.predictor_blocks = nn.ModuleList(NaiveBlock(width, heads, 4 * width) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)

    def forward(self, context, context_index, target_index, grid, mask_token=0):
        images = []
        for tokens, seen, wanted in zip(context, context_index, target_index, strict=True):
            mask = self.mask_tokens[mask_token][0].expand(len(wanted), -1)
            index = torch.cat([seen, wanted])
            order = index.argsort()
            x = torch.cat([self.predictor_embed(tokens), mask])[order].unsqueeze(0)
            for block in self.predictor_blocks:
                x = block(x, places_of(index[order], grid).unsqueeze(0))
            x = self.predictor_norm(x)[0][order.argsort()]
            images.append(self.predictor_proj(x[len(seen) :]))
        return torch.stack(images)


class Naive:
    """The three networks of a released run, every weight drawn, and the dict that its code saves."""

    def __init__(self, device, seed=0):
        self.encoder = NaiveEncoder(42, 2, 3, 96, 2, 4)
        self.target_encoder = copy.deepcopy(self.encoder)
        self.predictor = NaivePredictor(42, 32, 2, 2, 4)
        generator = torch.Generator().manual_seed(seed)
        for part in (self.encoder, self.target_encoder, self.predictor):
            part.double().requires_grad_(False)
            for parameter in part.parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * (0.3 if parameter.ndim != 2 else parameter.shape[1] ** -0.5))
            part.to(device)

    def checkpoint(self, prefix="module.backbone."):
        parts = {
            name: {prefix + key: value.clone() for key, value in getattr(self, name).state_dict().items()}
            for name in ("encoder", "predictor", "target_encoder")
        }
        rest = {"opt": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 40, "loss": 0.1}
        return parts | rest | {"batch_size": 24, "world_size": 16, "lr": 1e-3}


KNOWN = {"num_heads": 3, "predictor_heads": 2, "image_size": (8, 12, 8)}
GRID = (4, 3, 2)


@pytest.fixture(scope="module")
def naive(device):
    return Naive(device)


@pytest.fixture(scope="module")
def clips(device):
    return torch.randn(2, 3, 8, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture(scope="module")
def context_index(device):
    return torch.tensor([[0, 5, 17, 9, 23], [20, 2, 7, 13, 11]], device=device)


@pytest.fixture(scope="module")
def target_index(device):
    return torch.tensor([[3, 12, 22, 8], [1, 19, 0, 6]], device=device)


@pytest.mark.parametrize("width", [14, 32, 64, 80, 88])
def test_the_rotation_is_that_of_the_released_code(device, width):
    places = GridPositions(Position.rope, width, 1, 1, 10_000.0, (16, 9, 12), legacy=True)
    (place,) = places.places((16, 9, 12), None, device)
    x = torch.randn(16 * 9 * 12, width, dtype=torch.float64, device=device)
    wanted = naive_rotation(x, places_of(torch.arange(len(x), device=device), (16, 9, 12)))
    found = rotate(x.view(1, 1, *x.shape), place.rotation)[0, 0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["module.backbone.", "backbone.", "module.", ""])
def test_both_branches_and_the_predictor_compute_the_same(naive, clips, context_index, target_index, prefix):
    model = from_vjepa2(naive.checkpoint(prefix), **KNOWN)
    for ours, theirs in ((model.encoder, naive.encoder), (model.target_encoder, naive.target_encoder)):
        torch.testing.assert_close(ours(clips), theirs(clips), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(clips, context_index), theirs(clips, context_index), atol=1e-5, rtol=1e-5)
    context = naive.encoder(clips, context_index)
    found = model.predictor(context, context_index, target_index.unsqueeze(1))[:, 0]
    torch.testing.assert_close(found, naive.predictor(context, context_index, target_index, GRID), atol=1e-5, rtol=1e-5)


def test_the_rotation_of_the_paper_would_not_compute_the_same(naive, clips):
    encoder = encoder_from_vjepa2(naive.checkpoint(), num_heads=3, image_size=(8, 12, 8))
    assert encoder.config.rope_legacy
    encoder.positions.legacy = False
    assert (encoder(clips) - naive.target_encoder(clips)).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(8, 8, 8), (4, 16, 8), (12, 4, 20)])
@pytest.mark.parametrize("branch", ["target", "online"])
def test_one_encoder_needs_its_entry_only_and_takes_any_clip_size(naive, size, branch):
    name = {"target": "target_encoder", "online": "encoder"}[branch]
    entry = {name: naive.checkpoint()[name]}
    encoder = encoder_from_vjepa2(entry, branch=branch, num_heads=3, image_size=size)
    clips = torch.randn(1, 3, *size, dtype=torch.float64).to(next(encoder.parameters()).device)
    torch.testing.assert_close(encoder(clips), getattr(naive, name)(clips), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask_token", [0, 2])
def test_one_mask_token_is_kept(naive, clips, context_index, target_index, mask_token):
    model = from_vjepa2(naive.checkpoint(), mask_token=mask_token, **KNOWN)
    context = naive.encoder(clips, context_index)
    wanted = naive.predictor(context, context_index, target_index, GRID, mask_token)
    found = model.predictor(context, context_index, target_index.unsqueeze(1))[:, 0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"missing: predictor\.mask_tokens\.4"):
        from_vjepa2(naive.checkpoint(), mask_token=4, **KNOWN)


def test_training_goes_on_with_the_loss_of_the_released_code(naive, clips, context_index, target_index):
    model = from_vjepa2(naive.checkpoint(), **KNOWN)
    predicted = naive.predictor(naive.encoder(clips, context_index), context_index, target_index, GRID)
    wanted = functional.layer_norm(naive.target_encoder(clips), (42,))
    wanted = torch.stack([row[index] for row, index in zip(wanted, target_index, strict=True)])
    loss = model([clips], context_index, target_index.unsqueeze(1), 0).loss
    torch.testing.assert_close(loss, (predicted - wanted).abs().mean(), atol=1e-5, rtol=1e-5)
    loss.backward()
    fixed = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert fixed == {f"target_encoder.{name}" for name, _ in model.target_encoder.named_parameters()}


@pytest.mark.parametrize(
    ("width", "depth", "heads", "hidden"),
    [(1024, 24, 16, 4096), (1280, 32, 16, 5120), (1408, 40, 22, 6144)],
    ids=["L", "H", "g"],
)
def test_released_sizes_are_read_from_the_shapes(width, depth, heads, hidden):
    with torch.device("meta"):
        entry = NaiveEncoder(width, depth, heads, hidden, 2, 16).state_dict()
        predictor = NaivePredictor(width, 384, 12, 12, 10).state_dict()
        entry["pos_embed"] = torch.zeros(1, 1568, width)
        predictor["predictor_pos_embed"] = torch.zeros(1, 1568, 384)
    model = from_vjepa2({"encoder": entry, "target_encoder": entry, "predictor": predictor})
    config = model.config.encoder
    assert (config.embed_dim, config.depth, config.num_heads) == (width, depth, heads)
    assert (config.patch_size, config.grid) == ((2, 16, 16), (32, 16, 16))
    assert model.encoder.transformer.blocks[0].mlp.fc1.out_features == hidden
    assert (model.config.predictor.depth, model.config.predictor.num_heads) == (12, 12)


def remove(part, key):
    return lambda checkpoint: checkpoint[part].pop(f"module.backbone.{key}")


def put(part, key, value):
    return lambda checkpoint: checkpoint[part].update({f"module.backbone.{key}": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("target_encoder", "blocks.1.mlp.fc2.bias"), r"missing: target_encoder\.blocks\.1\.mlp\.fc2\.bias;"),
        (remove("predictor", "mask_tokens.0"), r"missing: predictor\.mask_tokens\.0;"),
        (put("predictor", "action_encoder.weight", torch.zeros(1)), r"unexpected: predictor\.action_encoder\.weight;"),
        (put("encoder", "blocks.0.mlp.fc3.weight", torch.zeros(1)), r"unexpected: encoder\.blocks\.0\.mlp\.fc3"),
        (put("predictor", "mask_tokens.0", torch.zeros(1, 1, 7)), r"mask_tokens\.0 \(1, 1, 7\) for \(1, 1, 32\)"),
        (put("encoder", "norm.bias", torch.zeros(7)), r"other shapes: encoder\.norm\.bias \(7,\) for \(42,\)"),
        (put("encoder", "patch_embed.proj.weight", torch.zeros(42, 3, 4, 4)), r"allowed: \(width, channels, tubelet"),
        (lambda checkpoint: checkpoint.pop("target_encoder"), "missing: target_encoder; unexpected: none"),
        (lambda checkpoint: checkpoint.update(ema_encoder={}), "missing: none; unexpected: ema_encoder"),
    ],
)  # fmt: skip
def test_differences_are_listed_and_refused_in_one_line(naive, change, message):
    checkpoint = naive.checkpoint()
    change(checkpoint)
    with pytest.raises(ValueError, match=message) as error:
        from_vjepa2(checkpoint, **KNOWN)
    assert "\n" not in str(error.value)


def test_what_is_named_may_be_lost(naive, clips):
    checkpoint = naive.checkpoint() | {"ema_encoder": {}}
    checkpoint["encoder"]["module.backbone.extra"] = torch.zeros(1)
    model = from_vjepa2(checkpoint, drop=("ema_encoder", "encoder.extra"), **KNOWN)
    torch.testing.assert_close(model.encoder(clips), naive.encoder(clips), atol=1e-5, rtol=1e-5)


def test_heads_that_are_not_known_are_asked_for(naive):
    with pytest.raises(
        ValueError, match=r"predictor_heads=None: width 32 is no released size; allowed: 384 \(12 heads\)"
    ):
        from_vjepa2(naive.checkpoint(), num_heads=3)
    with pytest.raises(ValueError, match="num_heads=None: width 42"):
        encoder_from_vjepa2(naive.checkpoint())
