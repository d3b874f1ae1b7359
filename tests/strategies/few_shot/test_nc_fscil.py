from functools import partial

import pytest
import torch
from support.fakes import batch_of, normal
from support.few_shot import OPTIONS, sessions
from support.runs import assert_same, loop, plain_net, sgd
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.callback import ContinualCallback
from cl_lightning.loop.results import measures
from cl_lightning.models import Output, rotated_simplex
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.few_shot.nc_fscil import NCFSCIL, balanced_weights, paired
from cl_lightning.strategy import Phase, PhaseOptions
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "NCFSCIL": Subject(
        small(NCFSCIL, num_targets=12, embedding_size=16, session_options=PhaseOptions(epochs=2, batch_size=16)),
        first_task_is_finetuning=False,
        reason="dot regression to fixed targets",
    ),
}

PUBLISHED = {
    "nc_fscil": {
        "source": "Yang et al., the authors' config for CIFAR-100; a session of 50 to 200 steps as 50 epochs",
        "num_targets": 100,
        "embedding_size": 512,
        "loss_weight": 10.0,
        "mixup_probability": 0.4,
        "mixup_alpha": 0.8,
        "cutmix_probability": 0.4,
        "cutmix_alpha": 1.0,
        "pair_probability": 0.75,
        "balance": True,
        "novel_copies": 1,
        "session_options": {
            "epochs": 50,
            "batch_size": 64,
            "optimizer": "SGD(lr=0.25, momentum=0.9, weight_decay=0.0005)",
            "scheduler": "CosineOverPhase",
        },
        "optimizer": "SGD(lr=0.25, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase(final=0.01)",
    },
}

SMALL = partial(NCFSCIL, num_targets=10, embedding_size=12, session_options=PhaseOptions(epochs=8, batch_size=16))


def built(**options) -> NCFSCIL:
    """In a later session of 6 classes, on features of size 5."""
    made = NCFSCIL(num_targets=8, embedding_size=9, backbone=partial(plain_net), **options).double()
    made.build((1, 8, 8))
    made.network.head.grow(6)
    made.double()
    made.phase = Phase("session", features=made.session_features)
    return made


def test_weights_give_each_class_of_the_batch_the_same_share():
    labels = torch.tensor([4, 0, 0, 0, 2, 2])
    expected = torch.tensor([6 / 3, 6 / 9, 6 / 9, 6 / 9, 6 / 6, 6 / 6])
    torch.testing.assert_close(balanced_weights(labels, 7), expected)


def test_a_pair_is_the_mean_of_two_vectors_with_the_label_of_the_other():
    h, labels, order = normal(3, 4), torch.tensor([5, 6, 7]), torch.tensor([1, 2, 0])
    mean, others = paired(h, labels, order)
    torch.testing.assert_close(mean, torch.stack([h[0] + h[1], h[1] + h[2], h[2] + h[0]]) / 2)
    assert others.tolist() == [6, 7, 5]


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_the_loss_of_a_session_is_the_formula_of_a_plain_loop(balance, pairs, monkeypatch):
    made = built(balance=balance, pair_probability=pairs, loss_weight=3.0)
    orders = []

    def noted(embedded, labels, order):
        orders.append(order)
        return paired(embedded, labels, order)

    monkeypatch.setattr("cl_lightning.strategies.few_shot.nc_fscil.paired", noted)
    labels = torch.tensor([0, 3, 3, 5, 5, 5, 5])
    features = normal(7, made.network.head.num_features)
    batch = batch_of(labels).replace(draw=Draw(5, 0, 7, 7))
    loss = made.losses(batch, Output(features, made.network.head(features)))["dot_regression"]
    h, corners, counts = made.head.embed(features), rotated_simplex(8, 9).float().double(), {0: 1, 3: 2, 5: 4}

    def term(vector, label):
        r = (7 / (3 * counts[label])) ** 0.5 if balance else 1.0
        target = r * corners[label]
        return 0.5 * (vector / vector.norm() @ target - target.norm()) ** 2

    if pairs:
        [order] = orders
        assert sorted(order.tolist()) == list(range(7))
        assert order.tolist() != list(range(7))
        rows = [(h[i] + h[j]) / 2 for i, j in enumerate(order.tolist())]
        values = [
            0.5 * term(row, int(labels[i])) + 0.5 * term(row, int(labels[order[i]])) for i, row in enumerate(rows)
        ]
    else:
        assert not orders
        values = [term(row, int(label)) for row, label in zip(h, labels, strict=True)]
    torch.testing.assert_close(loss, 3.0 * sum(values) / 7)


def test_pairs_are_taken_with_their_probability():
    made = built(balance=False, pair_probability=0.3)
    h, labels = normal(6, 9), torch.arange(6)
    plain = 0.5 * ((F.normalize(h, dim=1) * made.head.targets[:6]).sum(1) - 1).square().mean()
    batches = [batch_of(labels).replace(draw=Draw(key, 0, 6, 6)) for key in range(200)]
    taken = sum(not torch.isclose(made.session_loss(h, labels, batch), plain) for batch in batches)
    assert 40 < taken < 80


def test_images_of_the_base_session_are_mixed_in_one_of_two_ways():
    made = built(mixup_probability=0.3, cutmix_probability=0.5)
    made.phase = Phase()
    labels = torch.arange(4)
    images = labels.float()[:, None, None, None].expand(-1, 1, 8, 8)
    kinds = []
    for key in range(300):
        batch = batch_of(labels, images=images).replace(draw=Draw(key, 0, 4, 4))
        found = made.prepare_batch(batch)
        whole = not found.images.frac().eq(0).all()  # mixup: means of whole images
        kinds.append("none" if "partner" not in found.extra else "mixup" if whole else "cutmix")
    assert 65 < kinds.count("mixup") < 115
    assert 125 < kinds.count("cutmix") < 175


def test_the_loss_of_images_is_dot_regression_with_both_labels_of_a_mixture():
    made = built(loss_weight=3.0)
    made.phase = Phase()
    labels, other = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    features = normal(3, made.network.head.num_features)
    logits = made.network.head(features)
    loss = made.losses(batch_of(labels), Output(features, logits))["dot_regression"]
    own, theirs = (((1 - logits[torch.arange(3), y]) ** 2).mean() / 2 for y in (labels, other))
    torch.testing.assert_close(loss, 3 * own)
    mixture = batch_of(labels).replace(extra={"partner": other, "remains": torch.full((3,), 0.25).double()})
    loss = made.losses(mixture, Output(features, logits))["dot_regression"]
    torch.testing.assert_close(loss, 3 * (0.25 * own + 0.75 * theirs))


class Look(ContinualCallback):
    def __init__(self):
        self.pools = []

    def on_train_start(self, trainer, strategy):
        if not strategy.task.is_first:
            pool = strategy.session_features()
            self.pools.append((pool.features.clone(), pool.labels.tolist()))


def test_a_session_trains_the_neck_on_its_features_and_on_stored_means():
    look = Look()
    made = sessions(SMALL(**OPTIONS, novel_copies=3), look, until=0)
    strategy = made.strategy
    with torch.no_grad():
        features, labels = strategy.passes.all_features()  # of the base session
    base = torch.stack([features[labels == c].double().mean(0) for c in range(6)]).float()
    backbone = {name: value.clone() for name, value in strategy.network.backbone.state_dict().items()}
    rows = strategy.head.weight().clone()
    made._run_task(made.stream.tasks[1], None)
    novel, labels = strategy.passes.all_features()
    made._run_task(made.stream.tasks[2], None)
    assert_same(backbone, strategy.network.backbone.state_dict())
    assert torch.equal(strategy.head.weight()[:6], rows)
    (first, of_first), (second, of_second) = look.pools
    assert sorted(of_first[:10]) == [6] * 5 + [7] * 5
    assert of_first[10:] == list(range(6))
    torch.testing.assert_close(first[:10], novel)
    torch.testing.assert_close(first[10:], base)
    assert sorted(of_second[:10]) == [8] * 5 + [9] * 5
    assert of_second[10:] == [*range(6), 6, 6, 6, 7, 7, 7]
    torch.testing.assert_close(second[16], novel[labels == 6].mean(0))


def test_without_training_in_sessions_the_network_stays_as_it_is():
    strategy = SMALL(**{**OPTIONS, "session_options": PhaseOptions(epochs=0)})
    made = sessions(strategy, until=0)
    before, steps = {k: v.clone() for k, v in strategy.network.named_parameters()}, made.trainer.global_step
    made._run_task(made.stream.tasks[1], None)
    assert_same(before, dict(strategy.network.named_parameters()))
    assert made.trainer.global_step == steps


def test_sessions_are_learnt_while_fine_tuning_forgets_the_base():
    options = {"mixup_probability": 0.0, "cutmix_probability": 0.0, "embedding_size": 64}
    options["session_options"] = PhaseOptions(epochs=20, batch_size=16)
    mine, plain = sessions(SMALL(**{**OPTIONS, **options})), sessions(Finetune(**OPTIONS))
    found, other = (measures(made.matrix, made.stream, 2) for made in (mine, plain))
    # Measured: a harmonic mean of .68 against 0, an average accuracy of .68.
    assert found["harmonic_accuracy"] > other["harmonic_accuracy"] + 0.4, found
    assert found["average_accuracy"] > 0.55, found


def test_options_out_of_range_and_too_few_targets_are_errors():
    for options, message in (
        ({"num_targets": 1}, "num_targets is 1; it must be at least 2"),
        ({"num_targets": 20, "embedding_size": 18}, "embedding_size is 18; it must be at least 19"),
        ({"loss_weight": 0.0}, "loss_weight is 0"),
        ({"pair_probability": 1.5}, "pair_probability is 1.5"),
        ({"mixup_probability": 0.6, "cutmix_probability": 0.6}, "their sum must be at most 1"),
        ({"novel_copies": 0}, "novel_copies is 0"),
        ({"loss_classes": "current"}, "loss_classes is 'current'; use 'all'"),
    ):
        with pytest.raises(ValueError, match=f"NCFSCIL: .*{message}"):
            NCFSCIL(**options)
    with pytest.raises(ValueError, match="SimplexHead: size is 9; it must be at least 10"):
        loop(NCFSCIL(num_targets=9, embedding_size=9, backbone=plain_net, optimizer=sgd)).fit()
