import pytest
import torch

from hjepa_models.objectives import l1, overshooting_loss


@pytest.mark.parametrize("tokens", [(), (2,)])
def test_deterministic_overshooting_equals_a_naive_loop(device, tokens):
    start, targets = torch.randn(2, 3, 5, *tokens, 4, dtype=torch.float64, device=device)
    actions = torch.randn(3, 5, *tokens, 4, dtype=torch.float64, device=device)
    matrix = torch.randn(4, 4, dtype=torch.float64, device=device, requires_grad=True)

    def step(x, action=None):
        out = torch.tanh(x @ matrix)
        return out if action is None else out + action

    for used in (None, actions):
        expected = 0.0
        for d in range(1, 4):
            errors = []
            for t in range(5 - d):
                x = start[:, t]
                for ahead in range(1, d + 1):
                    x = step(x) if used is None else step(x, used[:, t + ahead])
                errors.append((x - targets[:, t + d]).abs().mean())
            expected = expected + 0.9 ** (d - 1) * torch.stack(errors).mean() / 3
        loss = overshooting_loss(step, start, targets, 3, 0.9, l1, used)
        torch.testing.assert_close(loss, expected)
        # The gradient flows through every rolled prediction, not only the last application.
        torch.testing.assert_close(torch.autograd.grad(loss, matrix), torch.autograd.grad(expected, matrix))


@pytest.mark.parametrize("distance", [0, 4])
def test_distances_beyond_the_sequence_are_refused(device, distance):
    latents = torch.randn(3, 4, 2, device=device)
    with pytest.raises(ValueError, match=f"distance={distance}: .*allowed: 1 to 3"):
        overshooting_loss(lambda x: x, latents, latents, distance)
