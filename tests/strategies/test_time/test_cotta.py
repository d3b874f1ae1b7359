import itertools
from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, stream, tiny_resnet, watching
from support.fakes import normal
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_gamma,
    adjust_hue,
    adjust_saturation,
    affine,
)

from cl_lightning.batch import Draw
from cl_lightning.strategies.test_time import cotta
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.cotta import CoTTA, View, consistency, move_teacher, random_view, restore
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.testing import Subject, small

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


def test_a_share_of_the_weights_is_restored():
    net, source = nn.Linear(300, 200), nn.Linear(300, 200)
    before, share = net.weight.detach().clone(), 0.01
    restore(dict(net.named_parameters()), source, share, key=3)
    back = net.weight == source.weight
    n = before.numel()
    assert abs(int(back.sum()) - share * n) < 3 * (n * share * (1 - share)) ** 0.5
    assert torch.equal(net.weight[~back], before[~back])
    again = nn.Linear(300, 200)
    again.load_state_dict({"weight": before, "bias": net.bias})
    restore({"weight": again.weight}, source, share, key=3)
    assert torch.equal(again.weight == source.weight, back)  # the key decides
    restore(dict(net.named_parameters()), source, 1.0, key=0)
    assert torch.equal(net.weight, source.weight)


def test_views_are_images_drawn_once_for_a_batch():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = [random_view(images, Draw.of(6, seed)) for seed in range(8)]
    for view in views:
        assert view.shape == images.shape
        assert 0 <= view.min() <= view.max() <= 1
        assert not torch.equal(view, images)
    assert not torch.equal(views[0], views[1])
    assert torch.equal(views[0], random_view(images, Draw.of(6, 0)))
    draw = Draw.of(6, 0)
    part = Draw(draw.key, 2, 5, 6)  # another process's share
    torch.testing.assert_close(random_view(images[2:5], part), views[0][2:5])
    assert random_view(images[:, :1], Draw.of(6, 0)).shape == (6, 1, 16, 16)
    assert len(random_view(images[:0], Draw(0, 3, 3, 6))) == 0


def test_the_noise_of_a_view_is_normal_with_its_deviation():
    grey = torch.full((4, 3, 32, 32), 0.4)
    noise = random_view(grey, Draw.of(4, 5)).double()
    noise = noise - noise.mean((0, 2, 3), keepdim=True)  # colours change by the same amount everywhere
    assert float(noise.std()) == pytest.approx(0.005, rel=0.03)
    assert float((noise.abs() < 0.005).double().mean()) == pytest.approx(0.6827, abs=0.02)


PLAIN = View(blur=1e-3)


def test_each_part_of_a_view_is_what_it_says():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(PLAIN.of(images), images, **close)
    moved = PLAIN._replace(shift=(1 / 8, -1 / 16)).of(images)  # 4 pixels to the right, 2 up
    torch.testing.assert_close(moved[..., :-2, 4:], images[..., 2:, :-4], **close)
    edge = images[..., 2:, :1].expand(-1, -1, -1, 4)  # goes on
    torch.testing.assert_close(moved[..., :-2, :4], edge, **close)
    torch.testing.assert_close(PLAIN._replace(angle=90.0).of(images), images.rot90(1, (2, 3)), **close)
    torch.testing.assert_close(PLAIN._replace(mirrored=True).of(images), images.flip(3), **close)
    torch.testing.assert_close(PLAIN._replace(gamma=1.3).of(images), images**1.3, **close)
    torch.testing.assert_close(PLAIN._replace(brightness=0.6).of(images), 0.6 * images, **close)
    flat = torch.full((1, 3, 32, 32), 0.4, dtype=torch.float64)
    torch.testing.assert_close(PLAIN._replace(scale=0.9, angle=12.0, blur=0.5).of(flat), flat, **close)
    turned = PLAIN._replace(hue=1 / 3).of(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    torch.testing.assert_close(turned[0, :, 4, 4], torch.tensor([0.0, 1.0, 0.0]), **close)  # red to green


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
@pytest.mark.parametrize(
    ("angle", "scale", "across", "down"), [(15.0, 1.1, 3, -2), (-90.0, 0.9, -3, 1), (0.0, 1.0, 2, 1)]
)
def test_the_affine_map_is_that_of_torchvision(height, width, angle, scale, across, down):
    images = torch.zeros(2, 3, height, width, dtype=torch.float64)  # black at the edge, which both repeat outside
    images[..., 2:-2, 2:-2] = torch.rand(2, 3, height - 4, width - 4, generator=torch.Generator().manual_seed(0))
    view = PLAIN._replace(angle=angle, scale=scale, shift=(across / width, down / height))
    expected = affine(  # clockwise
        images, -angle, [across, down], scale, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(view.of(images), expected, rtol=0, atol=1e-6)


def test_contrast_and_saturation_match_torchvision():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for found, expected in (
        (PLAIN._replace(contrast=0.7), adjust_contrast(images, 0.7)),
        (PLAIN._replace(saturation=1.5), adjust_saturation(images, 1.5)),
        (PLAIN._replace(brightness=1.4), adjust_brightness(images, 1.4)),
    ):
        torch.testing.assert_close(found.of(images), expected, rtol=0, atol=1e-6)
    both = PLAIN._replace(contrast=0.7, saturation=1.5, order=(2, 0, 1, 3, 4)).of(images)
    torch.testing.assert_close(both, adjust_contrast(adjust_saturation(images, 1.5), 0.7), rtol=0, atol=1e-6)


def test_colours_are_those_of_torchvision_in_every_order():
    images = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changes = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.5, "hue": 0.05, "gamma": 1.2}
    by_torchvision = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue, adjust_gamma]
    for order in itertools.permutations(range(5)):
        expected = images
        for place in order:
            expected = by_torchvision[place](expected, list(changes.values())[place])
        found = PLAIN._replace(**changes, order=order).of(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # measured: 2e-6


def test_a_blurred_point_is_the_kernel():
    point = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    point[..., 4, 4] = 1.0
    found = PLAIN._replace(blur=0.5).of(point)[0, 0]
    line = torch.exp(-2 * torch.arange(-4.0, 5, dtype=torch.float64).square()).where(
        torch.arange(9).sub(4).abs() <= 2, 0
    )
    torch.testing.assert_close(found, torch.outer(line, line) / line.sum() ** 2, rtol=0, atol=1e-6)


def test_views_are_as_large_as_they_are_drawn_to_be():
    views = [View.drawn(key) for key in range(500)]
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.5, 1.5),
        ("hue", -0.06, 0.06),
        ("gamma", 0.7, 1.3),
        ("angle", -15, 15),
        ("scale", 0.9, 1.1),
        ("blur", 0.001, 0.5),
    ):
        values = torch.tensor([getattr(view, name) for view in views])
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    shifts = torch.tensor([view.shift for view in views])
    assert (shifts.amax(0) <= 0.125).all()
    assert (shifts.amax(0) > 0.12).all()
    assert (shifts.amin(0) >= -0.125).all()
    assert (shifts.amin(0) < -0.12).all()
    assert all(sorted(view.order) == [0, 1, 2, 3, 4] for view in views)
    assert 200 < sum(view.mirrored for view in views) < 300
    assert len({view.order for view in views}) > 100


def test_a_view_is_the_same_in_half_precision():
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = random_view(images, Draw.of(4, 3))
    assert torch.equal(half, random_view(images, Draw.of(4, 3)))


def test_without_views_and_restoration_it_is_a_plain_mean_teacher():
    strategy = watching(CoTTA, views=0, restore=0.0, teacher_momentum=0.9, params="norm", optimizer=sgd)
    made = adapt(strategy)
    student, teacher = source_network(), source_network()
    norms = [p for m in student.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    optimizer, expected = sgd(norms), []
    for images, _ in batches(made.datamodule):
        with torch.no_grad():
            target = teacher(images).logits
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
    monkeypatch.setattr(cotta, "random_view", lambda images, draw: (made.append(len(images)), images)[1])
    for threshold, count in ((0.0, 0), (1.1, 3 * 8)):  # 8 batches in all
        made.clear()
        strategy = watching(CoTTA, views=3, threshold=threshold, optimizer=adam)
        adapt(strategy)
        assert len(made) == count


def test_it_adapts_to_corruptions():
    options = {"samples": None, "batch_size": 71}
    errors = [
        adapt(watching(cls, **chosen), stream(**options)).matrix.measures()["mean_online_error"]
        for cls, chosen in ((Source, {}), (CoTTA, {"views": 4, "threshold": 0.7, "optimizer": adam}))
    ]
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
