from functools import partial

import pytest
import torch
from support.pretrained import TinyViT, in_tasks, samples_right

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, SSF, Adapter, RidgeHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.pretrained.ranpac import RanPAC
from cl_lightning.testing import Subject, small

# SSF: the small net has no transformer blocks for an adapter.
SUBJECTS = {
    "RanPAC": Subject(
        small(RanPAC, peft=SSF, projection=40, ridge=[0.1, 10.0, 1000.0]),
        first_task_is_finetuning=False,
        reason="the head is fitted in closed form when the session ends",
    ),
}

random_features = partial(MLP, hidden=(64,))
adam = partial(torch.optim.Adam, lr=3e-3)
SMALL = partial(RanPAC, backbone=random_features, peft=SSF, projection=300, optimizer=adam)


def test_without_phase_1_and_for_a_fixed_ridge_the_split_into_tasks_does_not_matter():
    made = [in_tasks(partial(SMALL, adapt=False, ridge=10.0), count) for count in (1, 2, 5, 10)]
    assert len({samples_right(one) for one in made}) == 1
    first, *others = [one.strategy.network.head.weight() for one in made]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-5)  # features are float32


def test_the_ridge_is_one_of_the_candidates_and_the_projection_is_kept():
    strategy = in_tasks(SMALL, 2).strategy
    head = strategy.network.head.final
    assert isinstance(head, RidgeHead)
    assert any(float(head.chosen) == 10.0**power for power in range(-8, 9))
    fresh = SMALL()
    fresh.build((1, 8, 8))
    fresh.load_state_dict(strategy.state_dict())
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(fresh.eval().predict(images), strategy.eval().predict(images))


def test_the_gram_matrix_is_symmetric_and_semi_definite():
    made = in_tasks(partial(SMALL, adapt=False, projection=64, ridge=1.0), 5)
    gram = made.strategy.network.head.gram
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-9)
    assert torch.linalg.eigvalsh(gram).min() > -1e-9 * gram.diagonal().max()


def test_a_random_projection_beats_plain_regression_and_forgets_nothing():
    plain = in_tasks(partial(Finetune, backbone=random_features, optimizer=adam), 5, max_epochs=3)
    without = in_tasks(partial(SMALL, projection=None), 5, max_epochs=3)
    made = in_tasks(SMALL, 5, max_epochs=3)
    right = [samples_right(one) for one in (plain, without, made)]
    assert right == sorted(right)
    # Measured: .97, fine-tuning .17.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.matrix.R_ci) + 0.35


def test_a_transformer_is_adapted_by_adapters():
    made = in_tasks(partial(RanPAC, backbone=TinyViT, projection=100, optimizer=adam), 5)
    assert isinstance(made.strategy.network.backbone.peft, Adapter)
    assert made.strategy.network.head.num_features == 24  # the adapted ones alone


@pytest.mark.parametrize(
    ("options", "words"), [({"ridge": -1.0}, "ridge is -1"), ({"projection": 0}, "projection is 0")]
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        RanPAC(**options)
