import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.adaptation import adapt, scores, source_network, watching
from support.fakes import batch_of, normal
from torch import Tensor

from cl_lightning.losses import entropy
from cl_lightning.models import Output
from cl_lightning.strategies.test_time.cotta import CoTTA
from cl_lightning.strategies.test_time.parts.filters import DiversityFilter, EntropyFilter, SampleFilter
from cl_lightning.strategies.test_time.parts.restoration import WeightEnsembling
from cl_lightning.strategies.test_time.tent import Tent

adam = partial(torch.optim.Adam, lr=0.01)
FIVE: Any = SimpleNamespace(num_source=5)


def weights(part: SampleFilter, logits: Tensor) -> Tensor:
    return part(FIVE, batch_of(torch.zeros(len(logits), dtype=torch.int64)), Output(logits, logits))


def test_low_entropy_is_selected_and_weighted():
    logits = 3 * normal(40, 5)
    values, most = entropy(logits), 0.4 * math.log(5)
    assert torch.equal(weights(EntropyFilter(0.4), logits), (values < most).double())
    expected = torch.where(values < most, (most - values).exp(), 0.0)
    torch.testing.assert_close(weights(EntropyFilter(0.4, weighted=True), logits), expected)
    assert 0 < int((values < most).sum()) < 40
    assert bool((weights(EntropyFilter(math.inf, weighted=True), logits) == 1).all())
    assert not weights(EntropyFilter(0.4, weighted=True), logits.requires_grad_()).requires_grad


def test_diverse_are_samples_unlike_the_mean():
    logits, part = 3 * normal(40, 5).float(), DiversityFilter(0.6)
    part.learn_source(FIVE)
    assert weights(part, logits).all()  # there is no mean yet
    part.learn(Output(logits, logits), torch.arange(40) < 10)
    mean = logits[:10].softmax(1).mean(0)
    torch.testing.assert_close(part.mean, mean)
    for row, found in zip(logits.softmax(1), weights(part, logits), strict=True):
        assert bool(found) == bool(row @ mean / row.norm() / mean.norm() < 0.6)
    part.learn(Output(logits, logits), torch.arange(40) >= 30)
    mean = 0.9 * mean + 0.1 * logits[30:].softmax(1).mean(0)
    torch.testing.assert_close(part.mean, mean)
    part.learn(Output(logits, logits), torch.zeros(40, dtype=torch.bool))
    torch.testing.assert_close(part.mean, mean)  # nothing was selected
    part.reset()
    assert not part.mean.any()


class OfFive(Tent):
    num_source = 5


class Odd(SampleFilter):
    """Selects every other row of the images in order of their sums, with weight 3; none at all if ``nothing``."""

    def __init__(self, *, nothing: bool = False) -> None:
        super().__init__()
        self.nothing = nothing

    def forward(self, strategy, batch, output):
        chosen = batch.images.flatten(1).sum(1).argsort().argsort() % 2 == 1
        return 3.0 * chosen * (not self.nothing)


def test_the_mean_is_over_the_selected_or_over_the_batch():
    for over, factor in (("selected", 3.0), ("batch", 1.5)):
        strategy = Tent(filters=[Odd()], mean_over=over)
        images, logits = normal(8, 1, 2, 2), normal(8, 5)
        batch = batch_of(torch.zeros(8, dtype=torch.int64), images=images)
        terms = strategy.parts.averaged(
            strategy, {"loss": entropy(logits), "weights": logits.sum()}, batch, Output(logits, logits)
        )
        rows = images.flatten(1).sum(1).argsort().argsort() % 2 == 1
        torch.testing.assert_close(terms["loss"], factor * entropy(logits)[rows].mean(), check_dtype=False)
        assert terms["weights"] == logits.sum()


def test_a_row_that_the_first_pass_of_a_step_rejects_stays_rejected_and_filters_learn_once():
    part = DiversityFilter(2.0)
    part.learn_source(FIVE)
    strategy = OfFive(filters=[EntropyFilter(0.5), part])
    batch = batch_of(torch.zeros(2, dtype=torch.int64))
    flat, sharp = torch.zeros(5), torch.tensor([5.0, 0, 0, 0, 0])
    first, second = torch.stack([flat, sharp]), torch.stack([sharp, sharp])
    assert (strategy.parts.weights(strategy, batch, Output(first, first)) > 0).tolist() == [False, True]
    mean = strategy.parts.filters[1].mean.clone()
    assert (strategy.parts.weights(strategy, batch, Output(second, second)) > 0).tolist() == [False, True]
    assert torch.equal(strategy.parts.filters[1].mean, mean)
    assert strategy.parts.step_moves()  # a new step
    assert (strategy.parts.weights(strategy, batch, Output(second, second)) > 0).all()


@pytest.mark.parametrize("cls", [Tent, CoTTA])
def test_filters_go_with_any_method_and_without_samples_nothing_moves(cls):
    chosen = {"optimizer": adam} | ({"views": 0, "restore": 0.0} if cls is CoTTA else {})
    plain, some, none = (watching(cls, filters=f, **chosen) for f in (None, [Odd()], [Odd(nothing=True)]))
    for strategy in (plain, some):
        adapt(strategy)
    assert not torch.equal(scores(plain), scores(some))
    none = watching(cls, filters=[Odd(nothing=True)], restoration=[WeightEnsembling(0.0)], **chosen)
    state = adapt(none).strategy.network.state_dict()
    before = source_network("source").state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if name in state)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: EntropyFilter(0.0), r"EntropyFilter: margin is 0\.0"),
        (lambda: DiversityFilter(0.0), r"DiversityFilter: diversity is 0\.0"),
        (lambda: DiversityFilter(momentum=1.5), r"DiversityFilter: momentum is 1\.5"),
        (lambda: Tent(mean_over="all"), "Tent: mean_over is 'all'"),
    ],
)
def test_options_out_of_range_are_errors(made, words):
    with pytest.raises(ValueError, match=words):
        made()
