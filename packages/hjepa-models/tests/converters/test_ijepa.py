import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from hjepa_models.converters import encoder_from_ijepa, from_ijepa


class NaiveAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        width = query.shape[-1] // self.heads
        mixed = []
        for head in range(self.heads):
            q, k, v = (part[..., head * width : (head + 1) * width] for part in (query, key, value))
            weights = torch.exp(torch.einsum("bqd,bkd->bqk", q, k) / width**0.5)
            mixed.append(torch.einsum("bqk,bkd->bqd", weights / weights.sum(-1, keepdim=True), v))
        return self.proj(torch.cat(mixed, dim=-1))


class NaiveMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * 0.5 * (1 + torch.erf(x / 2**0.5)))


class NaiveBlock(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = NaiveAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = NaiveMlp(dim, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NaivePatchEmbed(nn.Module):
    def __init__(self, channels, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)


class NaiveEncoder(nn.Module):
    def __init__(self, dim, depth, heads, hidden, patch, tokens, channels=3):
        super().__init__()
        self.patch_embed = NaivePatchEmbed(channels, dim, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.ModuleList(NaiveBlock(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images, index=None):
        x = self.patch_embed.proj(images).flatten(2).mT + self.pos_embed
        if index is not None:
            x = torch.stack([row[chosen] for row, chosen in zip(x, index, strict=True)])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class NaivePredictor(nn.Module):
    def __init__(self, dim, width, depth, heads, tokens):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.predictor_blocks = nn.ModuleList(NaiveBlock(width, heads, 4 * width) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)

    def forward(self, context, context_index, target_index):
        table = self.predictor_pos_embed[0]
        images = []
        for tokens, seen, blocks in zip(context, context_index, target_index, strict=True):
            visible = self.predictor_embed(tokens) + table[seen]
            predicted = []
            for block in blocks:
                x = torch.cat([visible, self.mask_token[0] + table[block]]).unsqueeze(0)
                for layer in self.predictor_blocks:
                    x = layer(x)
                predicted.append(self.predictor_proj(self.predictor_norm(x))[0, len(seen) :])
            images.append(torch.stack(predicted))
        return torch.stack(images)


class Naive:
    """The three networks of a released run, every weight drawn, and the dict that its code saves."""

    def __init__(self, device="cpu", tokens=9, heads=4, seed=0):
        self.encoder = NaiveEncoder(32, 2, heads, 96, 4, tokens)
        self.target_encoder = copy.deepcopy(self.encoder)
        self.predictor = NaivePredictor(32, 16, 3, heads, tokens)
        generator = torch.Generator().manual_seed(seed)
        for part in (self.encoder, self.target_encoder, self.predictor):
            part.double().requires_grad_(False)
            for parameter in part.parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * (0.3 if parameter.ndim != 2 else parameter.shape[1] ** -0.5))
            part.to(device)

    def checkpoint(self, prefix="module."):
        parts = {
            name: {prefix + key: value.clone() for key, value in getattr(self, name).state_dict().items()}
            for name in ("encoder", "predictor", "target_encoder")
        }
        rest = {"opt": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 300, "loss": 0.1}
        return parts | rest | {"batch_size": 128, "world_size": 16, "lr": 1e-3}


KNOWN = {"num_heads": 4}


@pytest.fixture(scope="module")
def naive(device):
    return Naive(device)


@pytest.fixture(scope="module")
def images(device):
    return torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture(scope="module")
def context_index(device):
    return torch.tensor([[0, 4, 8, 2], [3, 1, 7, 6]], device=device)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_both_branches_and_the_predictor_compute_the_same(naive, images, context_index, prefix):
    target_index = torch.tensor([[[1, 3], [5, 3], [7, 6]], [[0, 2], [8, 5], [4, 5]]], device=images.device)
    model = from_ijepa(naive.checkpoint(prefix), **KNOWN)
    for ours, theirs in ((model.encoder, naive.encoder), (model.target_encoder, naive.target_encoder)):
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(ours(images, context_index), theirs(images, context_index), atol=1e-10, rtol=1e-10)
    context = naive.encoder(images, context_index)
    wanted = naive.predictor(context, context_index, target_index)
    torch.testing.assert_close(model.predictor(context, context_index, target_index), wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("branch", ["target", "online"])
def test_one_encoder_needs_its_entry_only(naive, images, branch):
    name = {"target": "target_encoder", "online": "encoder"}[branch]
    encoder = encoder_from_ijepa({name: naive.checkpoint()[name]}, branch=branch, **KNOWN)
    torch.testing.assert_close(encoder(images), getattr(naive, name)(images), atol=1e-10, rtol=1e-10)
    assert not encoder.positions.table.requires_grad


def test_training_goes_on_with_the_loss_of_the_released_code(naive, images, context_index):
    model = from_ijepa(naive.checkpoint(), **KNOWN)
    # Places 3, 5 and 0 are in two blocks, whose predictions of them differ.
    hidden = torch.tensor([[[1, 3], [5, 3], [7, 5]], [[0, 2], [8, 0], [4, 5]]], device=images.device)
    predicted = naive.predictor(naive.encoder(images, context_index), context_index, hidden)
    wanted = functional.layer_norm(naive.target_encoder(images), (32,))
    wanted = torch.stack([row[blocks] for row, blocks in zip(wanted, hidden, strict=True)])
    loss = model([images], context_index, hidden, 0).loss
    torch.testing.assert_close(loss, functional.smooth_l1_loss(predicted, wanted), atol=1e-6, rtol=1e-6)
    loss.backward()
    fixed = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    tables = {"encoder.positions.table", "predictor.positions.table"}
    assert fixed == tables | {f"target_encoder.{name}" for name, _ in model.target_encoder.named_parameters()}


def test_the_model_shares_nothing_with_the_checkpoint(naive, images):
    checkpoint = naive.checkpoint()
    model = from_ijepa(checkpoint, **KNOWN)
    before = model.features(images)
    for name in ("encoder", "target_encoder", "predictor"):
        for value in checkpoint[name].values():
            value.fill_(7)
    assert torch.equal(model.features(images), before)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "hidden", "patch", "side", "predictor_depth"),
    [
        (768, 12, 12, 3072, 16, 14, 6),
        (1024, 24, 16, 4096, 16, 14, 12),
        (1280, 32, 16, 5120, 14, 16, 12),
        (1280, 32, 16, 5120, 16, 28, 12),
        (1408, 40, 16, 6144, 16, 14, 16),
    ],
    ids=["B/16", "L/16", "H/14", "H/16-448", "g/16"],
)
def test_released_sizes_are_read_from_the_shapes(width, depth, heads, hidden, patch, side, predictor_depth):
    with torch.device("meta"):
        encoder = NaiveEncoder(width, depth, heads, hidden, patch, side**2)
        predictor = NaivePredictor(width, 384, predictor_depth, heads, side**2)
    entry = encoder.state_dict()
    model = from_ijepa({"encoder": entry, "target_encoder": entry, "predictor": predictor.state_dict()})
    config = model.config.encoder
    assert (config.embed_dim, config.depth, config.num_heads) == (width, depth, heads)
    assert (config.patch_size, config.image_size) == ((patch, patch), (side * patch, side * patch))
    assert model.encoder.transformer.blocks[0].mlp.fc1.out_features == hidden
    assert (model.config.predictor.depth, model.config.predictor.embed_dim) == (predictor_depth, 384)
    assert model.config.predictor.num_heads == heads


def test_grids_that_are_not_square_need_their_size():
    naive = Naive(tokens=6)
    images = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"has no 6 patches of 4 x 4 pixels as encoder\.pos_embed"):
        from_ijepa(naive.checkpoint(), **KNOWN)
    for size, message in ((8, "image_size=8: no sequence"), ((8,), "has 1 axes"), ((8, 13), "axis 1 has 13 pixels")):
        with pytest.raises(ValueError, match=message):
            from_ijepa(naive.checkpoint(), image_size=size, **KNOWN)
    model = from_ijepa(naive.checkpoint(), image_size=(8, 12), **KNOWN)
    torch.testing.assert_close(model.encoder(images), naive.encoder(images), atol=1e-10, rtol=1e-10)


def remove(part, key):
    return lambda checkpoint: checkpoint[part].pop(f"module.{key}")


def put(part, key, value):
    return lambda checkpoint: checkpoint[part].update({f"module.{key}": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("target_encoder", "norm.bias"), r"missing: target_encoder\.norm\.bias; unexpected: none"),
        (remove("encoder", "pos_embed"), r"missing: encoder\.pos_embed;"),
        (remove("predictor", "mask_token"), r"missing: predictor\.mask_token;"),
        (remove("predictor", "predictor_blocks.1.attn.qkv.bias"), r"predictor\.predictor_blocks\.1\.attn\.qkv\.b"),
        (put("encoder", "cls_token", torch.zeros(1)), r"missing: none; unexpected: encoder\.cls_token;"),
        (put("encoder", "blocks.2.ls1.gamma", torch.zeros(1)), r"missing: encoder\.blocks\.2.*unexpected: .*ls1"),
        (put("encoder", "norm.weight", torch.zeros(31)), r"other shapes: encoder\.norm\.weight \(31,\) for \(32,\)"),
        (put("target_encoder", "pos_embed", torch.zeros(1, 4, 32)), r"target_.*pos_embed \(4, 32\) for \(9, 32\)"),
        (put("encoder", "patch_embed.proj.weight", torch.zeros(32, 48)), r"allowed: \(width, channels, patch, p"),
        (put("target_encoder", "patch_embed.proj.weight", torch.zeros(32)), r"shapes: target_encoder\.patch_embed"),
        (put("encoder", "norm.weight", [1.0]), r"no tensors: encoder\.norm\.weight"),
        (lambda checkpoint: checkpoint.pop("predictor"), "missing: predictor; unexpected: none"),
        (lambda checkpoint: checkpoint.update(ema={}), "missing: none; unexpected: ema"),
        (lambda checkpoint: checkpoint.update(encoder=3), "encoder is a int"),
        (lambda checkpoint: checkpoint.update(encoder={}), r"missing: encoder\.patch_embed\.proj\.weight"),
        (lambda checkpoint: checkpoint["encoder"].update(stray=torch.zeros(1)), r"unexpected: encoder\.module\."),
    ],
)  # fmt: skip
def test_differences_are_listed_and_refused_in_one_line(naive, change, message):
    checkpoint = naive.checkpoint()
    change(checkpoint)
    with pytest.raises(ValueError, match=message) as error:
        from_ijepa(checkpoint, **KNOWN)
    assert "\n" not in str(error.value)


def test_what_is_named_may_be_lost(naive, images):
    checkpoint = naive.checkpoint() | {"ema": 1}
    checkpoint["encoder"]["module.cls_token"] = torch.zeros(1)
    model = from_ijepa(checkpoint, drop=("ema", "encoder.cls_token"), **KNOWN)
    torch.testing.assert_close(model.encoder(images), naive.encoder(images), atol=1e-10, rtol=1e-10)
    with pytest.raises(ValueError, match=r"missing: encoder\.norm\.bias"):
        from_ijepa(naive.checkpoint(), drop=("encoder.norm.bias",), **KNOWN)


def test_heads_that_are_not_known_are_asked_for(naive):
    with pytest.raises(ValueError, match=r"num_heads=None: width 32 is no released size; allowed: 192 \(3 heads\)"):
        from_ijepa(naive.checkpoint())
    assert from_ijepa(naive.checkpoint(), num_heads=8, predictor_heads=2).config.predictor.num_heads == 2
    with pytest.raises(ValueError, match="num_heads=5: does not divide embed_dim=32"):
        encoder_from_ijepa(naive.checkpoint(), num_heads=5)
    with pytest.raises(ValueError, match="branch='teacher'"):
        encoder_from_ijepa(naive.checkpoint(), branch="teacher")
