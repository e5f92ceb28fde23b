import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hjepa_eval import Classifier, FineTuneConfig, bootstrap, classify, finetune, layer_groups


class Encoder(nn.Module):
    num_prefix_tokens = 0

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 6))
        self.patch_embed = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.LayerNorm(6)

    def no_weight_decay(self):
        return {"pos_embed"}

    def forward(self, images):
        x = self.patch_embed(images.flatten(2).transpose(1, 2)) + self.pos_embed
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.norm(x)


def encoder():
    made = Encoder()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in made.parameters():
            if value.ndim > 1:
                value.normal_(std=0.4, generator=generator)
            else:
                value.zero_()
        made.norm.weight.fill_(1.0)
    return made


def test_every_parameter_has_the_rate_of_its_layer():
    model = Classifier(encoder(), 6, 3)
    groups = layer_groups(model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    e = model.encoder
    assert found[id(e.pos_embed)] == (0.125, 0.0)
    assert found[id(e.patch_embed.weight)] == (0.125, 0.1)
    assert found[id(e.patch_embed.bias)] == (0.125, 0.0)
    assert found[id(e.blocks[0].weight)] == (0.25, 0.1)
    assert found[id(e.blocks[1].weight)] == (0.5, 0.1)
    assert found[id(e.norm.weight)] == (1.0, 0.0)
    assert found[id(model.head.weight)] == (1.0, 0.1)
    e.patch_embed.requires_grad_(False)
    left = layer_groups(model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    assert sum(len(g["params"]) for g in left) == len(found) - 2


def test_a_timm_encoder_has_one_layer_a_block():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=5)
    groups = layer_groups(model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    assert {g["layer"] for g in groups} == set(range(len(model.blocks) + 2))
    layer = {id(p): g["layer"] for g in groups for p in g["params"]}
    assert layer[id(model.cls_token)] == layer[id(model.patch_embed.proj.weight)] == 0
    assert layer[id(model.head.weight)] == layer[id(model.norm.weight)] == len(model.blocks) + 1


def striped(n, seed):
    """The class is the row whose pixels vary: no linear map of the pixels tells it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    images = 0.3 * torch.randn(n, 3, 2, 2, generator=generator)
    sign = torch.randint(0, 2, (n, 1, 2), generator=generator) * 2.0 - 1
    images[torch.arange(n), :, labels] += sign
    return images, labels


def batches(images, labels):
    return [(a, b) for a, b in zip(images.split(50), labels.split(50), strict=True)]


def test_fine_tuning_learns_and_frozen_shallow_layers_move_less(device):
    train, test = striped(400, 0), striped(400, 1)
    model = Classifier(encoder(), 6, 2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    config = FineTuneConfig(learning_rate=2e-2, layer_decay=0.5, epochs=15, label_smoothing=0.0)
    losses = finetune(model, lambda epoch: batches(*train), 8, config, device=device)
    assert losses[-1] < 0.5 * losses[0]
    right, labels = classify(model, batches(*test), device=device)
    assert right.double().mean() > 0.9
    assert len(labels) == 400
    moved = {
        name: float((value.detach().cpu() - before[name]).abs().mean()) for name, value in model.named_parameters()
    }
    assert moved["encoder.patch_embed.weight"] < moved["encoder.blocks.1.weight"] < moved["head.weight"]


def test_an_accuracy_of_all_or_none_has_its_exact_interval():
    images, labels = striped(20, 0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        plain[1].weight.zero_()
        plain[1].bias.copy_(torch.tensor([1.0, 0.0]))
    found = [bootstrap(classify(plain, [(images, torch.full_like(labels, wrong))])[0]) for wrong in (0, 1)]
    end = 0.025 ** (1 / 20)
    assert [(one.value, one.low, one.high) for one in found] == [(1.0, end, 1.0), (0.0, 0.0, 1 - end)]


def test_steps_are_those_of_adamw_by_hand(device):
    """Rates of layers that rise and fall, decay of weights alone, smoothed labels, gradients cut to their norm."""
    images, labels = striped(200, 0)
    model, plain = Classifier(encoder(), 6, 2).to(device), Classifier(encoder(), 6, 2).double()
    config = FineTuneConfig(
        learning_rate=0.1, layer_decay=0.5, weight_decay=0.5, epochs=2, warmup=0.5, label_smoothing=0.4, clip_norm=0.02
    )
    losses = finetune(model, lambda epoch: batches(images, labels), 4, config, device=device)
    layer = {"patch_embed": 0, "pos_embed": 0, "blocks.0": 1, "blocks.1": 2}
    rate, decay, first, second = {}, {}, {}, {}
    for name, value in plain.named_parameters():
        rate[name] = 0.1 * 0.5 ** (3 - next((at for part, at in layer.items() if f"encoder.{part}" in name), 3))
        decay[name] = 0.5 if name.endswith("weight") and value.ndim > 1 else 0.0
        first[name] = second[name] = torch.zeros_like(value)
    by_hand = []
    for step, (x, y) in enumerate(batches(images, labels) * 2):
        log_p = plain(x.double()).log_softmax(1)
        loss = -(0.6 * log_p[torch.arange(50), y] + 0.4 * log_p.mean(1)).mean()
        by_hand.append(loss.item())
        found = dict(zip(rate, torch.autograd.grad(loss, list(plain.parameters())), strict=True))
        norm = sum(float(value.square().sum()) for value in found.values()) ** 0.5
        assert norm > 0.02
        factor = (step + 1) / 5 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 4))
        for name, value in plain.named_parameters():
            gradient = found[name] * 0.02 / norm
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            move = first[name] / (1 - 0.9 ** (step + 1)) / ((second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            value.data -= rate[name] * factor * (move + decay[name] * value.data)
    assert losses == pytest.approx([sum(by_hand[:4]) / 4, sum(by_hand[4:]) / 4], rel=1e-4)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), rtol=2e-3, atol=2e-3, msg=name)


def test_a_wrapped_classifier_averages_its_gradients_and_trains_alike():
    def average(averaged, bucket):
        averaged.append(len(bucket.gradients()))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    train, averaged, losses = striped(200, 0), [], []
    config = FineTuneConfig(learning_rate=2e-2, layer_decay=0.5, epochs=2)
    alone, inside = Classifier(encoder(), 6, 2), Classifier(encoder(), 6, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(inside)
        wrapped.register_comm_hook(averaged, average)
        for model in (alone, wrapped):
            losses.append(finetune(model, lambda epoch: batches(*train), 4, config))
    finally:
        dist.destroy_process_group()
    assert sum(averaged) == 8 * len(list(inside.parameters()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for (name, mine), theirs in zip(inside.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_labels_that_no_class_has_are_refused(device):
    images, labels = striped(50, 0)
    for wrong, message in ((labels - 1, "unknown"), (labels + 1, "num_classes=2"), (labels.float(), "integers")):
        with pytest.raises(ValueError, match=message):
            finetune(Classifier(encoder(), 6, 2), lambda epoch, y=wrong: [(images, y)], 1, device=device)


def test_epochs_read_their_own_batches_and_no_more_than_announced(device):
    train, seen = striped(400, 0), []

    def epoch_batches(epoch):
        for number, batch in enumerate(batches(*train)):
            seen.append((epoch, number))
            yield batch

    finetune(Classifier(encoder(), 6, 2), epoch_batches, 2, FineTuneConfig(epochs=2), device=device)
    assert [one for one in seen if one[1] < 2] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_network_without_a_list_of_blocks_is_trained_without_layer_decay(device):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    config = FineTuneConfig(learning_rate=0.1, layer_decay=1.0, epochs=1)
    images, labels = striped(100, 0)
    before = plain[1].weight.detach().clone()
    finetune(plain, lambda epoch: batches(images, labels), 2, config, device=device)
    assert not torch.equal(plain[1].weight.cpu(), before)
    groups = layer_groups(plain, learning_rate=0.1, layer_decay=1.0, weight_decay=0.05)
    assert {group["lr"] for group in groups} == {0.1}
    with pytest.raises(ValueError, match=r"layer_decay=0\.65.*blocks=\[\.\.\.\]"):
        layer_groups(plain, learning_rate=0.1, layer_decay=0.65, weight_decay=0.05)


def test_the_rate_falls_though_epochs_end_early(device, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def noted(self, *arguments):
        rates.append(max(group["lr"] for group in self.param_groups))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    config = FineTuneConfig(learning_rate=0.1, epochs=4, warmup=0.0)
    train = striped(100, 0)
    finetune(Classifier(encoder(), 6, 2), lambda epoch: batches(*train), 20, config, device=device)
    at = [20 * epoch + number for epoch in range(4) for number in range(2)]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 80)) for step in at])
    assert rates[-1] < 0.02


def test_what_cannot_be_trained_is_refused_in_one_line(device):
    for change in ({"layer_decay": 0.0}, {"learning_rate": 0.0}, {"epochs": 0}, {"clip_norm": 0.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            FineTuneConfig(**change)
    with pytest.raises(ValueError, match="none"):
        finetune(Classifier(encoder(), 6, 2), lambda epoch: [], 2)
    train = striped(50, 0)
    broken = [(train[0] * float("nan"), train[1])]
    with pytest.raises(ValueError, match="not finite"):
        finetune(Classifier(encoder(), 6, 2), lambda epoch: broken, 1, FineTuneConfig(epochs=2), device=device)


class Stages(nn.Module):
    """Two stages of two blocks, downsampling between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.stages = nn.Sequential(*(self.stage() for _ in range(2)))
        self.norm = nn.LayerNorm(4)

    @staticmethod
    def stage():
        parts = nn.Module()
        parts.downsample, parts.blocks = nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        return parts


def test_stages_count_their_blocks_on_and_downsampling_goes_with_the_block_before():
    model = Stages()
    layer = {
        id(p): (g["layer"], g["lr"])
        for g in layer_groups(model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
        for p in g["params"]
    }
    first, second = model.stages
    for part, number in (
        (model.stem, 0), (first.downsample, 0), (first.blocks[0], 1), (first.blocks[1], 2), (second.downsample, 2),
        (second.blocks[0], 3), (second.blocks[1], 4), (model.norm, 5),
    ):  # fmt: skip
        assert {layer[id(p)] for p in part.parameters()} == {(number, 0.5 ** (5 - number))}
