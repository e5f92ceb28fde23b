import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hjepa_eval import FewShotConfig, few_shot
from hjepa_eval.probes.few_shot import draw_samples


def classes(n, seed, noise=2.0):
    means = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    return means[labels] + noise * torch.randn(n, 12, generator=generator), labels


def test_more_labels_help_and_every_score_has_its_interval_and_count(device):
    (x, y), (test_x, test_y) = classes(1000, 0), classes(1500, 1)
    scores = few_shot(x.to(device), y.to(device), test_x.to(device), test_y.to(device))
    assert [score.labels for score in scores] == ["1-shot", "5-shot", "10-shot", "1%", "10%"]
    assert [score.n_train for score in scores[:3]] == [4, 20, 40]
    assert scores[4].n_train == sum(round(0.1 * int(count)) for count in y.bincount())
    means = [score.interval.value for score in scores]
    assert means[0] < means[1] < means[2] < means[4]
    for score in scores:
        assert score.interval.low < score.interval.value < score.interval.high
        assert (score.interval.method, score.interval.n, len(score.draws)) == ("draws", 5, 5)
        assert len(set(score.draws)) > 1


def test_where_all_samples_are_taken_there_is_one_draw_and_no_interval():
    (x, _), (test_x, test_y) = classes(40, 0), classes(200, 1)
    config = FewShotConfig(shots=(5, 10), shares=(0.5, 1.0))
    found = {one.labels: one for one in few_shot(x, torch.arange(40) % 4, test_x, test_y, config)}
    assert {labels: len(one.draws) for labels, one in found.items()} == {"5-shot": 5, "50%": 5, "10-shot": 1, "100%": 1}
    for labels in ("10-shot", "100%"):
        one = found[labels].interval
        assert (one.value, one.method, one.n) == (found[labels].draws[0], "none", 1)
        assert one.low != one.low
        assert one.high != one.high
    assert found["5-shot"].interval.method == "draws"


def test_accuracies_are_whole_samples_over_their_number():
    (x, y), (test_x, test_y) = classes(200, 0), classes(400, 1)
    for score in few_shot(x, y, test_x, test_y):
        assert [draw in {right / 400 for right in range(401)} for draw in score.draws] == [True] * 5


def test_a_draw_is_the_logistic_regression_of_its_samples(device):
    (x, y), (test_x, test_y) = classes(300, 2), classes(800, 3)
    config = FewShotConfig(shots=(5,), shares=(), draws=3, seed=7)
    (score,) = few_shot(x.to(device), y.to(device), test_x.to(device), test_y.to(device), config)
    mean, scale = x.mean(0), x.std(0, correction=0)
    for draw, ours in enumerate(score.draws):
        chosen = draw_samples(y, [5] * 4, seed=7, draw=draw)
        assert y[chosen].bincount().tolist() == [5] * 4
        theirs = LogisticRegression(C=1 / (20 * config.l2), max_iter=2000)
        theirs.fit(((x - mean) / scale)[chosen].numpy(), y[chosen].numpy())
        assert ours == pytest.approx(theirs.score(((test_x - mean) / scale).numpy(), test_y.numpy()), abs=0.003)


def test_wide_features_and_one_shot_are_fitted_to_the_minimum(device):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(10, 384, generator=generator)
    labels = torch.arange(3000) % 10
    x = (means[labels] + 4 * torch.randn(3000, 384, generator=generator)) @ torch.randn(384, 384, generator=generator)
    y, test_y = labels.split((1000, 2000))
    x, test_x = ((part - x[:1000].mean(0)) / x[:1000].std(0, correction=0) for part in x.split((1000, 2000)))
    config = FewShotConfig(shots=(1,), shares=())
    (score,) = few_shot(x.to(device), y.to(device), test_x.to(device), test_y.to(device), config)
    for draw, ours in enumerate(score.draws):
        chosen = draw_samples(y, [1] * 10, seed=0, draw=draw)
        theirs = LogisticRegression(C=1 / (10 * config.l2), max_iter=2000, tol=1e-8)
        theirs.fit(x[chosen].double().numpy(), y[chosen].numpy())
        assert ours == pytest.approx(theirs.score(test_x.double().numpy(), test_y.numpy()), abs=0.0015)


def test_autocast_around_changes_nothing(device):
    (x, y), (test_x, test_y) = classes(300, 4), classes(4000, 5)
    data = [part.to(device) for part in (x, y, test_x, test_y)]
    plain = few_shot(*data)
    with torch.autocast(device.type, torch.bfloat16):
        assert few_shot(*data) == plain


def test_draws_differ_and_small_ones_are_parts_of_large_ones():
    labels = torch.arange(100) % 4
    small, large = (set(draw_samples(labels, [size] * 4, seed=0, draw=0).tolist()) for size in (2, 10))
    assert small < large
    assert large != set(draw_samples(labels, [10] * 4, seed=0, draw=1).tolist())


def test_numbers_that_a_class_cannot_give_are_left_out(device):
    x, y = torch.eye(6, device=device), torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    scores = few_shot(x, y, x, y, FewShotConfig(shots=(3, 4), shares=(0.01,)))
    assert [score.labels for score in scores] == ["3-shot", "33.3%"]
    assert scores[1].n_train == 2


def test_a_share_that_no_class_can_give_is_told_as_the_one_that_is_taken():
    (x, _), (test_x, test_y) = classes(60, 0), classes(50, 1)
    config = FewShotConfig(shots=(), shares=(0.001, 0.01, 0.1))
    found = few_shot(x, torch.arange(60) % 3, test_x, test_y, config)
    assert [(score.labels, score.n_train) for score in found] == [("5%", 3), ("10%", 6)]


def test_wrong_input_is_refused():
    for change, message in (({"shots": (0,)}, "shots"), ({"draws": 1}, "draws"), ({"l2": 0}, "l2")):
        with pytest.raises(ValueError, match=message):
            FewShotConfig(**change)
    with pytest.raises(ValueError, match="train_labels: there are none, or some are below 0"):
        few_shot(torch.zeros(2, 2), torch.tensor([0, -1]), torch.zeros(2, 2), torch.tensor([0, 1]))


def test_two_widths_are_refused():
    labels = torch.arange(4) % 2
    with pytest.raises(ValueError, match="one width"):
        few_shot(torch.eye(4), labels, torch.eye(4)[:, :2], labels)
