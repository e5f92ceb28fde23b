import pytest
import torch

from hjepa_eval import AttentiveProbe, AttentiveProbeConfig, HeadTraining
from hjepa_eval.probes.accuracy import split
from hjepa_eval.probes.attentive import AttentiveHead

TRAINING = HeadTraining(
    learning_rates=(3e-3,), weight_decays=(0.01,), epochs=20, batch_size=64, optimizer="adamw", warmup=0.1
)


def marked(n, seed):
    """The class stands in one token at a random place: the mean of the tokens hardly shows it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    tokens = torch.randn(n, 16, 32, generator=generator)
    place = torch.randint(0, 16, (n,), generator=generator)
    tokens[torch.arange(n), place] = 0
    tokens[torch.arange(n), place, 0] = 8.0
    tokens[torch.arange(n), place, 1 + labels] = 8.0
    return tokens, labels


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 4])
def test_attention_finds_the_token_that_tells(device, blocks):
    (tokens, labels), (test_tokens, test_labels) = marked(400, 0), marked(300, 1)
    config = AttentiveProbeConfig(blocks=blocks, num_heads=2, training=TRAINING, mlp_ratio=2.0)
    probe = AttentiveProbe(config).fit(tokens.half(), labels, device=device)
    assert probe.accuracy(test_tokens.half(), test_labels) > 0.9
    assert probe.chosen.held_out > 0.9


def test_order_of_tokens_does_not_matter_and_every_block_has_weights(device):
    config = AttentiveProbeConfig(blocks=4)
    head = AttentiveHead(64, 3, config, torch.Generator().manual_seed(0)).to(device).eval()
    tokens = torch.randn(2, 9, 64, device=device)
    torch.testing.assert_close(head(tokens), head(tokens.flip(1)), rtol=1e-4, atol=1e-5)
    assert len(head.blocks) == 3
    single = AttentiveHead(64, 3, AttentiveProbeConfig(), torch.Generator().manual_seed(0))
    assert not len(single.blocks)
    assert all(value.isfinite().all() for value in head.parameters())
    assert all(value.abs().max() < 0.1 for name, value in head.named_parameters() if value.ndim > 1)


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (
        AttentiveHead(8, 3, AttentiveProbeConfig(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.query, other.query)


def test_wrong_input_is_refused_in_one_line():
    for change, message in (
        ({"blocks": 0}, "blocks"),
        ({"num_heads": 0}, "num_heads"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentiveProbeConfig(**change)
    with pytest.raises(ValueError, match="does not divide"):
        AttentiveHead(10, 2, AttentiveProbeConfig(num_heads=3), torch.Generator())
    with pytest.raises(ValueError, match="one label a sample"):
        AttentiveProbe().fit(torch.zeros(3, 2, 4), torch.arange(2))
    with pytest.raises(RuntimeError, match="fit"):
        AttentiveProbe().predict(torch.zeros(3, 2, 4))


@pytest.mark.parametrize("refit", [False, True])
def test_the_chosen_head_is_trained_again_on_all_samples(refit):
    """Two samples of a class that the first round never sees, as they are held out."""
    held = split(40, 0.05, 0)[1]
    tokens, labels = 0.1 * marked(40, 0)[0], torch.arange(40) % 2
    tokens[:, :, 5], labels[held] = 0.0, 2
    tokens[held, :, 5] = 9.0
    quick = HeadTraining(
        learning_rates=(1e-2,),
        weight_decays=(0.0,),
        epochs=20,
        batch_size=40,
        optimizer="adamw",
        held_out=0.05,
        refit=refit,
    )
    probe = AttentiveProbe(AttentiveProbeConfig(num_heads=2, mlp_ratio=1.0, training=quick)).fit(tokens, labels)
    assert (probe.predict(tokens[held]) == 2).all() == refit


def test_a_second_fit_forgets_the_first():
    tokens, labels = marked(40, 0)
    quick = HeadTraining(learning_rates=(1e-3, 1e-2), weight_decays=(0.0,), epochs=1, batch_size=16, optimizer="adamw")
    config = AttentiveProbeConfig(num_heads=2, mlp_ratio=1.0, training=quick)
    again, fresh = AttentiveProbe(config).fit(tokens, labels), AttentiveProbe(config)
    assert again.fit(tokens, labels.flip(0)).candidates == fresh.fit(tokens, labels.flip(0).int()).candidates
