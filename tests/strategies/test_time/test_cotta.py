from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, online_errors, scores, source_network, tiny_resnet, watching
from support.fakes import normal
from torch import nn
from torch.nn import functional as F

from cl_lightning.strategies.test_time import mean_teacher
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.cotta import CoTTA
from cl_lightning.strategies.test_time.mean_teacher import consistency, move_teacher
from cl_lightning.strategies.test_time.parts import views
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.testing import Subject, small

SLOW = "each step runs the network, its teacher and the source, the teacher on views"
SUBJECTS = {
    "CoTTA": Subject(small(CoTTA, backbone=tiny_resnet, views=2, teacher_momentum=0.9)),
}
WAITS = {"CoTTA": {"_target"}}  # whether further views are needed

PUBLISHED = {
    "cotta": {
        "source": "qinenergy/cotta: cifar/cfgs/cifar10/cotta.yaml and cotta.py",
        "teacher_momentum": 0.999,
        "restore": 0.01,
        "threshold": 0.92,
        "views": 32,
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

adam = partial(torch.optim.Adam, lr=1e-3)
sgd = partial(torch.optim.SGD, lr=0.01)


def test_the_loss_is_the_cross_entropy_with_the_teacher():
    student, teacher = normal(5, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    loss = consistency(student, teacher)
    torch.testing.assert_close(loss, F.cross_entropy(student, teacher.detach().softmax(1), reduction="none"))
    both = consistency(student, teacher, symmetric=True)
    other = F.cross_entropy(teacher.detach(), student.softmax(1), reduction="none")
    torch.testing.assert_close(both, (loss + other) / 2)
    loss.sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, student.detach().softmax(1) - teacher.detach().softmax(1))


def test_the_teacher_is_the_moving_average_of_the_student_and_takes_no_statistics():
    teacher, student = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double() for _ in range(2))
    student[1].running_mean.fill_(5.0)
    expected = {n: 0.9 * p + 0.1 * student.get_parameter(n) for n, p in teacher.named_parameters()}
    move_teacher(teacher, student, 0.9)
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-7)
    assert float(teacher[1].running_mean.sum()) == 0.0


def test_without_restoration_it_is_a_mean_teacher_on_views(monkeypatch):
    monkeypatch.setattr(mean_teacher, "viewed", lambda strategy, batch, draw: batch.images.flip(-1))
    options = {"views": 2, "threshold": 1.1, "restore": 0.0, "teacher_momentum": 0.9, "params": "norm"}
    strategy = watching(CoTTA, **options, optimizer=sgd)
    made = adapt(strategy)
    student, teacher = source_network(), source_network()
    norms = [p for m in student.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    optimizer, expected = sgd(norms), []
    for images, _ in batches(made.datamodule):
        with torch.no_grad():
            target = teacher(images.flip(-1)).logits
        expected.append(target)
        optimizer.zero_grad()
        F.cross_entropy(student(images).logits, target.softmax(1)).backward()
        optimizer.step()
        move_teacher(teacher, student, 0.9)
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_with_full_restoration_the_student_is_the_source():
    strategy = watching(CoTTA, views=0, restore=1.0, teacher_momentum=0.5, optimizer=adam)
    made = adapt(strategy)
    source = source_network("source").state_dict()
    for name, value in made.strategy.network.named_parameters():
        if name in source:
            assert torch.equal(value, source[name])
    moved = made.strategy.teacher.network.get_parameter("backbone.conv1.weight") - source["backbone.conv1.weight"]
    assert 0 < float(moved.abs().max()) <= 1.1e-3  # one step of Adam at most, averaged


def test_without_a_learning_rate_it_is_batch_norm_adaptation():
    still, plain = watching(CoTTA, views=0, optimizer=partial(torch.optim.SGD, lr=0.0)), watching(BNAdapt)
    adapt(still)
    adapt(plain)
    torch.testing.assert_close(scores(still), scores(plain), rtol=1e-5, atol=1e-5)


def test_views_are_made_only_where_the_source_is_not_confident(monkeypatch):
    made = []
    monkeypatch.setattr(views, "random_view", lambda images, draw, **kind: (made.append(len(images)), images)[1])
    for threshold, count in ((0.0, 0), (1.1, 3 * 8)):  # 8 batches in all
        made.clear()
        strategy = watching(CoTTA, views=3, threshold=threshold, optimizer=adam)
        adapt(strategy)
        assert len(made) == count


def test_it_adapts_to_corruptions():
    errors = online_errors((Source, {}), (CoTTA, {"views": 4, "threshold": 0.7, "optimizer": adam}))
    # Measured: an error of .09 against .42.
    assert errors[1] < errors[0] - 0.15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher_momentum": 1.5}, r"teacher_momentum is 1\.5"),
        ({"restore": -0.1}, r"restore is -0\.1"),
        ({"views": -1}, "views is -1"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=f"CoTTA: .*{words}"):
        CoTTA(**options)
