"""Weighted k-nearest-neighbour classification: exact, in tiles of bounded memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_eval.probes.accuracy import check_finite, check_known, check_widths, count_classes, top1
from hjepa_eval.probes.precision import full_precision
from hjepa_eval.probes.rows import first_equal, norms, rows_at_once

SPARE = 64  # candidates beyond k, so that what float32 cannot tell apart is seldom more than they are
VOTES = 2**24  # votes held at once: 128 MiB
ROWS = 1024  # test rows of a tile: enough for a matrix product to run at full speed


def knn_predict(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    memory: int | None = None,
    num_classes: int | None = None,
) -> dict[int, Int[Tensor, " m"]]:
    """Predict the class of each test row by the weighted votes of its k nearest training rows.

    Rows are divided by their L2 norm; neighbour j of a test row i votes for its class with exp(cos(i, j) / T), and the
    class with the largest sum wins. Cosines are those of float64. Ties: of equal cosines the row that comes first in
    the bank is nearer; votes are added from the nearest neighbour to the farthest, and of equal sums the lowest class
    wins. The result depends neither on the memory nor on the device.

    Args:
        train: Features of the bank.
        train_labels: Their classes, 0 and up.
        test: Features to classify, on the same device.
        ks: Numbers of neighbours; all are computed in one pass.
        temperature: T of the votes.
        memory: Bytes of similarities held at once, see nearest; a few times as much is used beside the features.
        num_classes: Number of classes; None: the largest label + 1.

    Returns:
        The predicted classes for each k.

    Raises:
        ValueError: Where a k is not in [1, n], shapes disagree, a label is unknown or T is not above 0.

    Source:
        Wu et al. 2018 (arXiv 1805.01978), section 3.4; T = 0.07 and the values of k as in DINOv2 (arXiv 2304.07193).
    """
    ks = tuple(dict.fromkeys(ks))
    _check(train, train_labels, test, ks)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: it must be above 0; 0.07 is usual")
    classes = count_classes(train_labels, num_classes)
    cosine, index = nearest(train, test, max(ks), memory=memory)
    neighbours = train_labels.long()[index]
    # exp((cos - largest) / T) is the vote up to one factor a row, which no comparison sees.
    weight = ((cosine - cosine[:, :1]) / temperature).exp()
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    step = max(1, VOTES // classes)
    for chosen, strength in zip(torch.split(neighbours, step), torch.split(weight, step), strict=True):
        votes = strength.new_zeros(len(chosen), classes)
        for j in range(max(ks)):
            # One neighbour at a time: the order of the sum is then fixed on every device.
            votes.scatter_add_(1, chosen[:, j : j + 1], strength[:, j : j + 1])
            if j + 1 in parts:
                parts[j + 1].append(votes.argmax(dim=1))
    return {k: torch.cat(parts[k]) for k in ks}


def knn_accuracy(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    test_labels: Int[Tensor, " m"],
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    memory: int | None = None,
) -> dict[int, float]:
    """Share of test rows whose class knn_predict finds, in [0, 1], for each k.

    Args:
        train: Features of the bank.
        train_labels: Their classes.
        test: Features to classify.
        test_labels: Their true classes.
        ks: Numbers of neighbours.
        temperature: T of the votes.
        memory: Bytes of similarities held at once; see knn_predict.

    Returns:
        Top-1 accuracy for each k.

    Raises:
        ValueError: As knn_predict.
    """
    if test_labels.shape != test.shape[:1]:
        raise ValueError(f"test_labels of shape {tuple(test_labels.shape)} for {len(test)} rows: give one label a row")
    check_known(test_labels, "test_labels")
    predicted = knn_predict(train, train_labels, test, ks=ks, temperature=temperature, memory=memory)
    return {k: top1(p, test_labels) for k, p in predicted.items()}


def nearest(
    bank: Float[Tensor, "n D"], rows: Float[Tensor, "m D"], k: int, *, memory: int | None = None
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """The k rows of a bank with the largest cosine to each row: exactly those of float64, equal ones in bank order.

    Float32 products find k + 64 candidates. With v the k-th largest of them and e the bound of their rounding, no row
    of the bank whose product is below v - 2 e is among the k nearest. Where the last candidate is not below that, the
    whole bank is searched in float64. Candidates are then ranked by float64 cosines. Copies of a row beyond the first k
    can never be among the k nearest and are left out first, so that features that have collapsed cost no more.

    Args:
        bank: Features to search.
        rows: Features to search for, on the same device.
        k: Number of neighbours, 1 to n.
        memory: Bytes of similarities held at once; None: 256 MiB on a CPU, 2 GiB elsewhere.

    Returns:
        Float64 cosines, largest first, and the positions in the bank.

    Raises:
        ValueError: Where k is not in [1, n], or features are not finite.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k}: it must be from 1 to the {len(bank)} rows of the bank")
    memory = memory if memory is not None else 2**28 if bank.device.type == "cpu" else 2**31
    kept = _without_copies(bank, k, memory)
    if kept is not None:
        cosine, index = nearest(bank[kept], rows, k, memory=memory)
        return cosine, kept[index]
    norms, row_norms = _norms(bank, memory), _norms(rows, memory)
    cosine = torch.empty(len(rows), k, dtype=torch.float64, device=rows.device)
    index = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    # The bound holds for float32 products.
    with full_precision(bank.device.type):
        value, candidates = _candidates(bank, norms, rows, row_norms, min(len(bank), k + SPARE), memory)
        bound = value[:, k - 1 : k] - 2 * _rounding(bank.shape[1], torch.float32)
        proven = value[:, -1] < bound[:, 0]
        search = _Search(bank, norms, rows, row_norms, k, memory)
        if candidates.shape[1] == len(bank):
            proven = torch.ones_like(proven)
        # A sort by float64 cosines holds some more numbers for each candidate.
        for some in torch.split(proven.nonzero().flatten(), max(1, memory // (64 * candidates.shape[1]))):
            found, order = candidates[some].sort(dim=1)
            row, column = (value[some].gather(1, order) >= bound[some]).nonzero().unbind(1)
            cosine[some], index[some] = search.rank(some, row, found[row, column])
        for some in torch.split((~proven).nonzero().flatten(), max(1, memory // (64 * len(bank)))):
            if len(some):
                cosine[some], index[some] = search.rank(some, *search.reachable(some))
    return cosine, index


def _candidates(
    bank: Tensor, norms: Tensor, rows: Tensor, row_norms: Tensor, count: int, memory: int
) -> tuple[Tensor, Tensor]:
    """The largest float32 products of each row with the bank, largest first, and their positions."""
    value = torch.full((len(rows), count), -torch.inf, device=rows.device)
    index = torch.zeros(len(rows), count, dtype=torch.int64, device=rows.device)
    step = max(1, memory // (4 * max(ROWS, 6 * bank.shape[1])))
    for first in range(0, len(bank), step):
        tile = _unit(bank[first : first + step], norms[first : first + step])
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            similarity = _unit(rows[part], row_norms[part]) @ tile.T
            best, place = similarity.topk(min(count, similarity.shape[1]), dim=1)
            best, order = torch.cat((value[part], best), dim=1).topk(count, dim=1)
            value[part], index[part] = best, torch.cat((index[part], place + first), dim=1).gather(1, order)
    return value, index


@dataclass(slots=True)
class _Search:
    """Ranks rows of a bank by float64 cosines."""

    bank: Tensor
    norms: Tensor
    rows: Tensor
    row_norms: Tensor
    k: int
    memory: int

    def reachable(self, some: Int[Tensor, " r"]) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
        """Pairs (row, position in the bank) that float64 products cannot exclude, by row and position."""
        unit = self.rows[some].double() / self.row_norms[some, None]
        step = max(1, self.memory // (32 * self.bank.shape[1]))
        tiles = zip(torch.split(self.bank, step), torch.split(self.norms, step), strict=True)
        similarity = torch.cat([unit @ (tile.double() / norm[:, None]).T for tile, norm in tiles], dim=1)
        last = similarity.topk(self.k, dim=1).values[:, -1:]
        row, index = (similarity >= last - 2 * _rounding(self.bank.shape[1], torch.float64)).nonzero().unbind(1)
        return row, index

    def rank(self, some: Int[Tensor, " r"], row: Int[Tensor, " p"], index: Int[Tensor, " p"]) -> tuple[Tensor, Tensor]:
        """The k largest cosines of each row among pairs in the order of rows and positions, and their positions."""
        cosine = self._cosines(some[row], index)
        # The most significant key is sorted last; each sort keeps the order of the one before.
        order = cosine.sort(stable=True, descending=True).indices
        order = order[row[order].sort(stable=True).indices]
        start = torch.searchsorted(row, torch.arange(len(some), device=row.device))
        chosen = order[start[:, None] + torch.arange(self.k, device=row.device)]
        return cosine[chosen], index[chosen]

    def _cosines(self, row: Int[Tensor, " p"], index: Int[Tensor, " p"]) -> Float[Tensor, " p"]:
        # Each is summed in the same order wherever it stands, which matrix products do not promise: copies stay equal.
        step = rows_at_once(self.bank, 32, self.memory)
        pieces = [
            (self.rows[a].double() * self.bank[b].double()).sum(dim=1) / (self.row_norms[a] * self.norms[b])
            for a, b in zip(torch.split(row, step), torch.split(index, step), strict=True)
        ]
        return torch.cat(pieces)


def _rounding(width: int, dtype: torch.dtype) -> float:
    """Bound of |product of two rounded unit vectors - their cosine|: at most width + 8 roundings."""
    return (width + 8) * torch.finfo(dtype).eps / 2


def _unit(rows: Tensor, norms: Tensor) -> Float[Tensor, "n D"]:
    return (rows.double() / norms[:, None]).float()


def _without_copies(bank: Tensor, k: int, memory: int) -> Int[Tensor, " kept"] | None:
    """Positions of the bank without copies of a row beyond the first k; None where nothing is left out."""
    ordered, order = first_equal(bank, memory).sort(stable=True)
    place = torch.arange(len(bank), device=bank.device) - torch.searchsorted(ordered, ordered)
    kept = order[place < k]
    return kept.sort().values if len(kept) < len(bank) else None


def _norms(rows: Tensor, memory: int) -> Float[Tensor, " n"]:
    found = norms(rows, memory)
    check_finite(found)
    return found


def _check(train: Tensor, train_labels: Tensor, test: Tensor, ks: Sequence[int]) -> None:
    check_widths(train, test)
    if train_labels.shape != train.shape[:1]:
        raise ValueError(
            f"train_labels of shape {tuple(train_labels.shape)} for {len(train)} rows: give one label a row"
        )
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise ValueError(f"ks={tuple(ks)}: each k must be from 1 to the {len(train)} training samples")
    check_known(train_labels, "train_labels")
