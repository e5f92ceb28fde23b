import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from hjepa_models.objectives.kl import categorical_kl, dynamics_kl, kl_balance
from hjepa_models.random import fold_in, gumbel, row_seeds
from hjepa_models.state import (
    State,
    StateConfig,
    latent_overshooting,
    straight_through_sample,
)

SMALL = {"recurrent_dim": 12, "hidden_dim": 10, "num_groups": 3, "num_classes": 4}


def build(device, action_dim=2, embed_dim=5, context_dim=0, seed=0, **fields):
    return StateConfig(**(SMALL | fields)).build(
        action_dim, embed_dim, context_dim=context_dim, seed=seed, device=device
    )


def sequence(device, batch=3, steps=4, dtype=torch.float32):
    actions = torch.randn(batch, steps, 2, dtype=dtype, device=device)
    return actions, torch.randn(batch, steps, 5, dtype=dtype, device=device)


# Random numbers.


# Samples.


@given(st.integers(2, 6), st.floats(0.2, 3.0), st.integers(0, 2**31))
def test_samples_are_exactly_one_hot_with_the_gradient_of_the_soft_ones(device, classes, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 2, classes, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    noise = gumbel(seed, (5, 2, classes), device)
    for drawn in (noise, None):
        perturbed = logits if drawn is None else logits + drawn
        soft = (perturbed / temperature).softmax(-1)
        hard = straight_through_sample(logits, drawn, temperature)
        assert torch.equal(hard, functional.one_hot(perturbed.argmax(-1), classes).to(hard.dtype))
        readout = torch.randn(hard.shape, generator=generator, dtype=torch.float64).to(device)
        (through,) = torch.autograd.grad((hard * readout).sum(), logits)
        (wanted,) = torch.autograd.grad((soft * readout).sum(), logits)
        torch.testing.assert_close(through, wanted)
        assert through.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_half_samples_are_exact_too(device, dtype):
    z = straight_through_sample(torch.randn(4096, 8, device=device).to(dtype), gumbel(1, (4096, 8), device), 0.7)
    assert z.dtype == dtype
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert (z.sum(-1) == 1).all()


@pytest.mark.parametrize("unimix", [0.0, 0.2])
def test_frequencies_of_samples_are_the_probabilities(device, unimix):
    rows, groups, classes = 20_000, 3, 5
    model = build(device, num_groups=groups, num_classes=classes, unimix=unimix)
    with torch.no_grad():
        model.prior_head[-1].bias.copy_(1.5 * torch.randn(groups * classes))
    actions = torch.zeros(rows, 1, 2, device=device)
    imagined = model.imagine(model.initial(rows), actions, 11)
    probability = imagined.prior_logits[0, 0].exp()
    torch.testing.assert_close(probability.sum(-1), torch.ones(groups, device=device))
    soft = model.prior_head(imagined.h[0, 0]).view(groups, classes).softmax(-1)
    torch.testing.assert_close(probability, (1 - unimix) * soft + unimix / classes)
    counts = imagined.z.sum((0, 1)).view(groups, classes)
    chi_square = ((counts - rows * probability) ** 2 / (rows * probability)).sum(-1)
    degrees = classes - 1
    assert (chi_square < degrees + 5 * math.sqrt(2 * degrees)).all()
    one_hot = imagined.z.view(rows, groups, classes)
    for a, b in ((0, 1), (1, 2)):
        joint = torch.einsum("ni,nj->ij", one_hot[:, a], one_hot[:, b]) / rows
        assert (joint - probability[a].unsqueeze(1) * probability[b]).abs().max() < 0.015


# The recurrent model.


def naive_rollout(model, actions, embeddings, noise):
    """The equations step by step and row by row, without the module's own methods."""
    config = model.config
    weights = dict(model.named_parameters())

    def layer_norm(x, name):
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[
            f"{name}.bias"
        ]

    def silu(x):
        return x / (1 + (-x).exp())

    def law(x, name):
        hidden = silu(layer_norm(weights[f"{name}.0.weight"] @ x + weights[f"{name}.0.bias"], f"{name}.1"))
        logits = (weights[f"{name}.3.weight"] @ hidden + weights[f"{name}.3.bias"]).view(config.num_groups, -1)
        powers = logits.exp()
        share = config.unimix / config.num_classes
        return ((1 - config.unimix) * powers / powers.sum(-1, keepdim=True) + share).log()

    rows = []
    for b in range(len(actions)):
        h, z, row = weights["initial_h"].tanh(), torch.zeros(model.feature_dim - config.recurrent_dim).to(actions), []
        for t in range(actions.shape[1]):
            x = weights["input.0.weight"] @ torch.cat([z, actions[b, t]]) + weights["input.0.bias"]
            x = silu(layer_norm(x, "input.1"))
            gates = layer_norm(weights["gates.0.weight"] @ torch.cat([x, h]), "gates.1")
            reset, candidate, update = gates.view(3, -1)
            update = 1 / (1 + (1 - update).exp())
            h = update * torch.tanh(candidate / (1 + (-reset).exp())) + (1 - update) * h
            prior = law(h, "prior_head")
            seen = prior if embeddings is None else law(torch.cat([h, embeddings[b, t]]), "posterior_head")
            z = functional.one_hot((seen + noise[b][t]).argmax(-1), config.num_classes).flatten().to(h)
            row.append((h, z, seen, prior))
        rows.append([torch.stack(part) for part in zip(*row, strict=True)])
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def noise_of(seed, stream, batch, steps, shape, device):
    seeds = [[fold_in(fold_in(fold_in(seed, row), stream), step) for step in range(steps)] for row in range(batch)]
    return [[gumbel(int(key), shape).to(device) for key in row] for row in seeds]


def float64_model(device, **fields):
    model = build("cpu", **fields).double().to(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(device))
    return model


def test_rollouts_equal_a_naive_float64_loop(device):
    model = float64_model(device)
    actions, embeddings = sequence(device, dtype=torch.float64)
    rollout = model.observe(actions, embeddings, 9)
    h, z, posterior, prior = naive_rollout(model, actions, embeddings, noise_of(9, 0, 3, 4, (3, 4), device))
    assert torch.equal(rollout.z, z)
    torch.testing.assert_close(rollout.h, h)
    torch.testing.assert_close(rollout.posterior_logits, posterior)
    torch.testing.assert_close(rollout.prior_logits, prior)

    imagined = model.imagine(model.initial(3), actions, 9)
    h, z, _, prior = naive_rollout(model, actions, None, noise_of(9, 1, 3, 4, (3, 4), device))
    assert torch.equal(imagined.z, z)
    torch.testing.assert_close(imagined.h, h)
    torch.testing.assert_close(imagined.prior_logits, prior)

    torch.testing.assert_close(imagined.features, torch.cat([h, z], -1))
    assert imagined.features.shape[-1] == rollout.features.shape[-1] == model.feature_dim == 24
    assert rollout.start.features.shape == (3, 24)


def test_evaluation_takes_the_mode(device):
    model = float64_model(device).eval()
    actions, embeddings = sequence(device, dtype=torch.float64)
    none = [[torch.zeros(3, 4, device=device)] * 4] * 3
    assert torch.equal(model.observe(actions, embeddings, 9).z, naive_rollout(model, actions, embeddings, none)[1])
    assert torch.equal(model.observe(actions, embeddings, 9).z, model.observe(actions, embeddings, 10).z)
    imagined = model.imagine(model.initial(3), actions, 9)
    assert torch.equal(imagined.z, naive_rollout(model, actions, None, none)[1])
    drawn = model.imagine(model.initial(3), actions, 9, sample=True)
    assert torch.equal(drawn.z, model.train().imagine(model.initial(3), actions, 9).z)
    assert not torch.equal(drawn.z, imagined.z)
    assert torch.equal(model.imagine(model.initial(3), actions, 9, sample=False).z, imagined.z)


def test_noise_is_a_pure_function_of_seed_step_and_row(device):
    model = build(device, num_groups=64, unimix=0.999)
    one = torch.ones(6, 5, 2, device=device), torch.ones(6, 5, 5, device=device)
    first, again, as_tensor = (model.observe(*one, seed).z.detach() for seed in (3, 3, torch.tensor(3)))
    assert torch.equal(first, again)
    assert torch.equal(first, as_tensor)
    assert torch.equal(first[:2], model.observe(one[0][:2], one[1][:2], 3).z)
    assert torch.equal(first[:, :2], model.observe(one[0][:, :2], one[1][:, :2], 3).z)
    # All laws are nearly even: two draws that have nothing to do with one another agree in a quarter of the groups.
    others = [
        model.observe(*one, 4).z,
        model.imagine(model.initial(6), one[0], 3).z,
        first.roll(1, 0),
        first.roll(1, 1),
    ]
    for other in others:
        agree = (first * other.detach()).sum(-1) / 64
        assert agree.max() < 0.6
        assert float(agree.mean()) == pytest.approx(0.25, abs=0.04)


def test_rows_go_on_over_processes(device, monkeypatch):
    assert row_seeds(7, 3, device).tolist() == [int(fold_in(7, row)) for row in range(3)]
    of_two = row_seeds(7, 8, device, views=2)
    assert of_two.tolist() == [int(fold_in(7, row)) for row in range(8)]
    assert torch.equal(row_seeds(of_two, 8), of_two)
    model = build(device)
    actions, embeddings = sequence(device, batch=4)
    together = model.observe(actions, embeddings, 5)
    some = model.observe(actions[1:3], embeddings[1:3], row_seeds(5, 4, device)[1:3])
    assert torch.equal(some.z, together.z[1:3])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert torch.equal(row_seeds(7, 4, device, views=2), of_two[[2, 3, 6, 7]])
    second = model.observe(actions[2:], embeddings[2:], 5)
    assert torch.equal(second.z, together.z[2:])


def test_the_start_follows_a_context_and_sequences_can_be_cut(device):
    model = build(device, context_dim=7)
    context = torch.randn(3, 7, device=device)
    start = model.initial(3, context)
    torch.testing.assert_close(start.h, (model.initial_h + context @ model.context.weight.T).tanh())
    actions, embeddings = sequence(device)
    model.eval()
    whole = model(actions, embeddings, 0, start)
    first = model(actions[:, :2], embeddings[:, :2], 0, start)
    second = model(actions[:, 2:], embeddings[:, 2:], 0, State(first.h[:, -1], first.z[:, -1]))
    torch.testing.assert_close(torch.cat([first.h, second.h], 1), whole.h)
    assert torch.equal(torch.cat([first.z, second.z], 1), whole.z)
    with pytest.raises(ValueError, match=r"context_dim=7: no context was given; allowed: .*; pass"):
        model.observe(actions, embeddings, 0)
    with pytest.raises(ValueError, match="context_dim=0: a context was given"):
        build(device).initial(3, context)


@pytest.mark.parametrize(
    ("actions", "embeddings"),
    [((3, 2, 4), (3, 5, 5)), ((3, 5, 4), (3, 2, 5)), ((3, 5, 4), (1, 5, 5)), ((3, 0, 4), (3, 0, 5))],
)
def test_actions_and_embeddings_that_are_not_one_sequence_are_refused(device, actions, embeddings):
    model = StateConfig(recurrent_dim=8, hidden_dim=8, num_groups=2, num_classes=3).build(4, 5, device=device)
    with pytest.raises(ValueError, match="do not belong to one sequence; allowed"):
        model.observe(torch.randn(actions, device=device), torch.randn(embeddings, device=device), 0)


def test_gradients_reach_every_parameter_and_every_input(device):
    model = build(device, context_dim=7, overshooting=3, free_bits=0.0)
    actions, embeddings = sequence(device)
    context = torch.randn(3, 7, device=device)
    inputs = [tensor.requires_grad_() for tensor in (actions, embeddings, context)]
    rollout = model(actions, embeddings, 0, model.initial(3, context))
    loss = model.loss(rollout, actions, 0).loss + rollout.features.square().mean()
    loss.backward()
    for tensor in (*inputs, *model.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() > 0


def test_deterministic_gradients_are_those_of_finite_differences(device):
    model = float64_model(device)
    state = State(
        torch.rand(2, 12, dtype=torch.float64, device=device), torch.eye(12, dtype=torch.float64)[:2].to(device)
    )
    action = torch.randn(2, 2, dtype=torch.float64, device=device, requires_grad=True)
    h, z = (part.requires_grad_() for part in state)
    assert torch.autograd.gradcheck(lambda *x: model.prior(model.advance(State(x[0], x[1]), x[2])), (h, z, action))


def test_meta_build_then_init_equals_a_direct_build(device):
    before = torch.random.get_rng_state()
    model = build("meta", context_dim=3)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device=device)
    model.init_weights(torch.Generator().manual_seed(4))
    direct = build(device, context_dim=3, seed=4)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in direct.state_dict().items())
    assert torch.equal(before, torch.random.get_rng_state())


def test_one_graph_serves_every_seed(device):
    model = build(device, overshooting=2)
    actions, embeddings = sequence(device, steps=2)

    def step(seed):
        rollout = model(actions, embeddings, seed)
        return rollout.z, model.imagine(rollout.start, actions, seed).z, model.loss(rollout, actions, seed).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    drawn = [compiled(torch.tensor(0))]
    with torch.compiler.set_stance("fail_on_recompile"):
        drawn += [compiled(torch.tensor(seed)) for seed in (1, 2, 2**40)]
    for seed, compiled_out in zip((0, 1, 2, 2**40), drawn, strict=True):
        for got, wanted in zip(compiled_out, step(seed), strict=True):
            torch.testing.assert_close(got, wanted)
    assert not torch.equal(drawn[0][0], drawn[1][0])
    # Plain numbers compile a second time when they first change, then never again.
    for seed in (5, 6):
        compiled(seed)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(7), step(7))


def test_a_step_reads_no_number_back():
    # On meta tensors whatever would wait for the device raises.
    model = build("meta", overshooting=2)
    actions, embeddings = sequence("meta")
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    rollout = model(actions, embeddings, seed)
    model.loss(rollout, actions, seed).loss.backward()
    assert model.imagine(rollout.start, actions, seed).features.shape == (3, 4, 24)


def test_half_precision_is_finite_and_keeps_the_state_wide(device):
    model = build(device, overshooting=3)
    actions, embeddings = sequence(device)
    with torch.autocast(device.type, torch.bfloat16):
        rollout = model(actions.bfloat16(), embeddings.bfloat16(), 0)
        loss = model.loss(rollout, actions.bfloat16(), 0).loss + rollout.features.square().mean()
    loss.backward()
    assert all(part.dtype == torch.float32 for part in (rollout.h, rollout.z, rollout.posterior_logits, loss))
    assert (rollout.z.view(3, 4, 3, 4).sum(-1) == 1).all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(rollout.h, model(actions, embeddings, 0).h, atol=0.2, rtol=0)
    narrow = build(device).bfloat16()
    assert narrow(actions.bfloat16(), embeddings.bfloat16(), 0).features.dtype == torch.bfloat16


# Overshooting.


def test_one_step_of_overshooting_is_the_dynamics_divergence_with_its_gradients(device):
    model = build(device)
    actions, embeddings = sequence(device)
    for free_bits in (0.0, 1.0):
        gradients = []
        for overshot in (True, False):
            rollout = model(actions, embeddings, 0)
            if overshot:
                loss = latent_overshooting(model, rollout, actions, 1, 0.5, free_bits)
            else:
                loss = dynamics_kl(rollout.posterior_logits, rollout.prior_logits, free_bits)
            gradients.append((loss, *torch.autograd.grad(loss, tuple(model.parameters()), materialize_grads=True)))
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("free_bits", [0.0, 0.6])
def test_overshooting_equals_a_naive_float64_loop_over_starts(device, training, free_bits):
    model = float64_model(device).train(training)
    batch, steps, distance, discount = 2, 5, 3, 0.7
    actions, embeddings = sequence(device, batch, steps, torch.float64)
    rollout = model(actions, embeddings, 0)
    total = 0.0
    for d in range(1, distance + 1):
        terms = []
        for b in range(batch):
            for t in range(steps - d + 1):
                h, z = (
                    (rollout.start.h[b], rollout.start.z[b]) if t == 0 else (rollout.h[b, t - 1], rollout.z[b, t - 1])
                )
                for ahead in range(d):
                    h = model.advance(State(h, z), actions[b, t + ahead])
                    prior = model.prior(h)
                    key = fold_in(fold_in(fold_in(fold_in(6, b), 2), t), ahead)
                    noise = gumbel(int(key), (3, 4)).to(device) if training else None
                    z = straight_through_sample(prior, noise).flatten()
                kl = categorical_kl(rollout.posterior_logits[b, t + d - 1], prior).sum()
                terms.append(max(free_bits, kl.item()))
        total += discount ** (d - 1) * sum(terms) / len(terms)
    loss = latent_overshooting(model, rollout, actions, distance, discount, free_bits, 6)
    assert loss.item() == pytest.approx(total / distance, rel=1e-9)


def test_overshooting_leaves_the_targets_alone_and_trains_through_the_rolled_states(device):
    model = build(device, free_bits=0.0)
    actions, embeddings = sequence(device, steps=3)
    rollout = model(actions, embeddings, 0)
    parts = [part.detach().requires_grad_() for part in rollout[1:]]
    start = State(*(part.detach().requires_grad_() for part in rollout.start))
    actions = actions.requires_grad_()
    # From the start alone to the last step: only a gradient that passes the rolled states reaches the first action.
    loss = latent_overshooting(model, type(rollout)(start, *parts), actions, 3, free_bits=0.0)
    h, z, posterior, _ = parts
    gradients = torch.autograd.grad(loss, (start.h, h, z, posterior, actions), allow_unused=True)
    assert gradients[3] is None
    assert all(gradient.abs().max() > 0 for gradient in gradients if gradient is not None)
    assert not gradients[1][:, -1].any()
    last = latent_overshooting(model, type(rollout)(start, *parts), actions, 3, 1.0, 0.0)
    before = latent_overshooting(model, type(rollout)(start, *parts), actions, 2, 1.0, 0.0)
    (first,) = torch.autograd.grad(3 * last - 2 * before, actions)
    assert (first.abs().amax((0, 2)) > 0).all()


def test_the_loss_of_the_module_is_the_published_sum(device):
    actions, embeddings = sequence(device)
    weights = {"free_bits": 0.3, "dynamics": 0.7, "representation": 0.2}
    plain, far = build(device, **weights), build(device, **weights, overshooting=3, discount=0.8)
    rollout = plain(actions, embeddings, 1)
    laws = rollout.posterior_logits, rollout.prior_logits
    expected = kl_balance(*laws, 0.3, 0.7, 0.2)
    torch.testing.assert_close(plain.loss(rollout, actions, 1), expected)
    overshot = latent_overshooting(far, rollout, actions, 3, 0.8, 0.3, 1)
    together = far.loss(rollout, actions, 1)
    torch.testing.assert_close(together.loss, 0.7 * overshot + kl_balance(*laws, 0.3, 0.0, 0.2).loss)
    torch.testing.assert_close(together.kl, expected.kl)
    assert not together.kl.requires_grad


def test_distances_beyond_the_sequence_are_refused(device):
    model = build(device, overshooting=5)
    actions, embeddings = sequence(device)
    rollout = model(actions, embeddings, 0)
    with pytest.raises(ValueError, match="distance=5: not within the sequence; allowed: 1 to 4; shorten"):
        latent_overshooting(model, rollout, actions, 5)
    whole = build(device, overshooting=4).loss(rollout, actions, 0)  # a config that asks for more takes the whole
    torch.testing.assert_close(model.loss(rollout, actions, 0).loss, whole.loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 1}, "num_classes=1: one class says nothing; allowed: 2 and more; use"),
        ({"num_groups": 0}, "num_groups=0"),
        ({"recurrent_dim": -1}, "recurrent_dim=-1"),
        ({"hidden_dim": 0}, "hidden_dim=0"),
        ({"unimix": 1.0}, "unimix=1.0: .*allowed: 0 <= unimix < 1"),
        ({"unimix": -0.1}, "unimix=-0.1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"free_bits": -1.0}, "free_bits=-1.0"),
        ({"dynamics": -1.0}, "dynamics=-1.0"),
        ({"representation": -1.0}, "representation=-1.0"),
        ({"overshooting": 0}, "overshooting=0"),
        ({"discount": 0.0}, "discount=0.0: .*allowed: 0 < discount <= 1"),
        ({"discount": 1.1}, "discount=1.1"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message) as refusal:
        StateConfig(**fields)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("widths", "message"), [((0, 5), "action_dim=0"), ((2, 0), "embed_dim=0"), ((2, 5), "context")]
)
def test_bad_widths(widths, message):
    with pytest.raises(ValueError, match=message):
        StateConfig(**SMALL).build(*widths, context_dim=-1)


# Learning.


class Toy(nn.Module):
    """A hybrid state and a linear readout of what is seen."""

    def __init__(self, device, **fields):
        super().__init__()
        self.state = build(device, action_dim=1, embed_dim=1, **fields)
        self.readout = nn.Linear(self.state.feature_dim, 1, device=device)

    def fit(self, draw, steps):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        history = []
        for step in range(steps):
            actions, seen = draw(step)
            rollout = self.state(actions, seen, step)
            divergence = self.state.loss(rollout, actions, step)
            error = (self.readout(rollout.features) - seen).square().mean()
            optimizer.zero_grad()
            (error + divergence.loss).backward()
            optimizer.step()
            history.append((float(error.detach()), float(divergence.kl)))
        return history

    @torch.no_grad()
    def foresee(self, actions, seed=0):
        imagined = self.state.imagine(self.state.initial(len(actions)), actions, seed, sample=True)
        return self.readout(imagined.features)


@pytest.mark.parametrize("overshooting", [1, 3])
def test_imagination_learns_to_follow_the_actions(device, overshooting):
    def draw(step):
        actions = torch.randn(32, 5, 1, generator=torch.Generator().manual_seed(step)).sign().to(device)
        return actions, actions.cumsum(1).tanh()

    toy = Toy(device, free_bits=0.1, overshooting=overshooting)
    actions, seen = draw(10_000)
    before = (toy.foresee(actions) - seen).square().mean()
    history = toy.fit(draw, 120)
    after = (toy.foresee(actions) - seen).square().mean()
    assert after < 0.1 * before
    errors, divergences = zip(*history, strict=True)
    assert divergences[0] > 0.3
    assert max(divergences[-10:]) < 0.1
    assert max(errors[-10:]) < 0.05 * errors[0]


def test_samples_cover_both_futures_where_a_deterministic_model_gives_their_mean(device):
    def draw(step):
        sign = torch.randn(64, 1, 1, generator=torch.Generator().manual_seed(step)).sign().to(device)
        return torch.zeros(64, 3, 1, device=device), sign.expand(-1, 3, -1)

    toy = Toy(device, free_bits=0.0, num_groups=1)
    history = toy.fit(draw, 250)
    # One coin in three steps is all that the posterior sees and the prior cannot foresee.
    assert sum(kl for _, kl in history[-20:]) / 20 == pytest.approx(math.log(2) / 3, rel=0.2)
    futures = torch.cat([toy.foresee(torch.zeros(64, 3, 1, device=device), seed) for seed in range(4)])
    assert (futures[:, 0].abs() - 1).abs().mean() < 0.2
    assert 0.25 < float((futures[:, 0] > 0).float().mean()) < 0.75
    # The choice of the first step is kept by the later ones.
    assert (futures[:, 0].sign() == futures[:, 2].sign()).float().mean() > 0.9

    network = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 1)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(150):
        actions, seen = draw(step)
        optimizer.zero_grad()
        (network(actions) - seen).square().mean().backward()
        optimizer.step()
    assert network(torch.zeros(1, 1, device=device)).abs().item() < 0.3
