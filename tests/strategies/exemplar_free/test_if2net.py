from functools import partial

import pytest
import torch
from support.pretrained import finetuning_in_tasks, in_tasks
from support.runs import run
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, RandomLayer
from cl_lightning.strategies.exemplar_free.icl import ICL
from cl_lightning.strategies.exemplar_free.if2net import IF2Net
from cl_lightning.stream import ClassIncremental, Subset
from cl_lightning.testing import Subject, check_limit, small

WHY = "the head has a closed form, nothing is trained"
SUBJECTS = {
    "IF2Net": Subject(small(IF2Net, units=150, tolerance=0.02), first_task_is_finetuning=False, reason=WHY),
    "IF2Net(ridge)": Subject(
        small(IF2Net, form="ridge", units=60, ridge=1.0), first_task_is_finetuning=False, reason=WHY
    ),
}

FEW = {"data": {"scenario": Subset(ClassIncremental(tasks=2), per_class=12)}, "max_epochs": 1}


class Look(IF2Net):
    """Keeps the hidden vectors and labels of each task, and the scores of all of them, as each task ends."""

    def __init__(self, **options):
        super().__init__(**options)
        self.rows, self.scores = [], []

    def end_task(self, task):
        super().end_task(task)
        features, labels = self.passes.features()
        self.rows.append((features.double(), labels))
        self.scores.append([self.network.head.linear(features) for features, _ in self.rows])


def test_the_orthogonal_form_is_the_recursion_by_samples():
    strategy = run(Look(units=300, tolerance=1e-6), **FEW).strategy
    weight, projector = torch.zeros(300, 10).double(), torch.eye(300).double()
    for features, labels in strategy.rows:
        for h, y in zip(features, F.one_hot(labels, 10).double(), strict=True):
            u = projector @ h
            if float(h @ u) > 1e-12 * float(h @ h):
                weight += torch.outer(u, y - h @ weight) / (h @ u)
                projector -= torch.outer(u, u) / (h @ u)
    head = strategy.network.head
    torch.testing.assert_close(head.weight().T, weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head.projector, projector, rtol=0, atol=1e-7)
    before, after = strategy.scores[0][0], strategy.scores[1][0]
    torch.testing.assert_close(after[:, :5], before, rtol=0, atol=1e-10)
    assert float(after[:, 5:].abs().max()) < 1e-10  # old samples score 0 as new classes


def test_the_ridge_form_is_the_joint_regression_and_tends_to_the_orthogonal_form():
    exact = run(Look(units=300, tolerance=1e-6), **FEW).strategy.network.head.weight()
    far = []
    for ridge in (1e-1, 1e-3, 1e-5):
        strategy = run(Look(form="ridge", units=300, ridge=ridge), **FEW).strategy
        h = torch.cat([features for features, _ in strategy.rows])
        y = F.one_hot(torch.cat([labels for _, labels in strategy.rows]), 10).double()
        joint = torch.linalg.solve(h.T @ h + ridge * torch.eye(300).double(), h.T @ y)
        torch.testing.assert_close(strategy.network.head.weight().T, joint, rtol=0, atol=1e-8)
        far.append(float((strategy.network.head.weight() - exact).norm()))
    assert far[2] < 0.02 * far[1] < 0.02 * far[0]


def test_on_a_random_layer_the_orthogonal_form_is_icl():
    hidden = partial(RandomLayer, units=40, backbone=partial(MLP, hidden=(16,)))
    check_limit(small(IF2Net, units=40, tolerance=0.02), small(ICL, backbone=hidden, tolerance=0.02), last_task=1)


def test_hidden_units_are_of_the_activation_and_on_the_pixels_by_default():
    strategy = IF2Net(units=7, activation="tanh")
    strategy.build((1, 8, 8))
    images = torch.randn(3, 1, 8, 8)
    layer = strategy.network.backbone.layer
    expected = (images.flatten(1) @ layer.weight.T + layer.bias).tanh()
    torch.testing.assert_close(strategy.network.backbone(images), expected)


def test_both_forms_learn_the_stream_and_finetuning_forgets_it():
    plain = last_accuracy(finetuning_in_tasks({"backbone": partial(MLP, hidden=(64,))}, 5, max_epochs=3).R_ci)
    # Measured: .97 (orthogonal) and .98 (ridge) against .2.
    for options in ({"tolerance": 0.02}, {"form": "ridge", "ridge": 1.0}):
        made = in_tasks(partial(IF2Net, units=600, **options), 5)
        assert last_accuracy(made.matrix.R_ci) > max(0.9, plain + 0.4)


@pytest.mark.parametrize(
    "options", [{"form": "exact"}, {"units": 0}, {"activation": "gelu"}, {"tolerance": 1.5}, {"ridge": 0.0}]
)
def test_options_out_of_range_are_errors(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"IF2Net: {name} is '?{value}'?; "):
        IF2Net(**options)
