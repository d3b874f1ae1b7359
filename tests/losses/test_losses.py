import math

import pytest
import torch
from support.fakes import batch_of, normal
from torch.nn import functional as F

from cl_lightning.losses import (
    binary_cross_entropy,
    cosine_feature_distillation,
    cross_entropy,
    dot_regression,
    feature_distillation,
    feature_norm_distillation,
    lwf_mc_targets,
    masked_logits,
    mean_over_selected,
    pod_spatial,
    row_factor,
    rows_of_all,
    sigmoid_distillation,
    softmax_distillation,
    supervised_contrastive,
)


def test_masked_classes_get_exactly_no_gradient_and_the_others_that_of_the_softmax_without_them():
    logits = normal(6, 5, requires_grad=True)
    visible = torch.tensor([True, False, True, True, False])
    labels = torch.tensor([0, 2, 3, 0, 2, 3])
    loss = cross_entropy(masked_logits(logits, visible), labels)
    loss.backward()
    alone = logits.detach()[:, visible].requires_grad_()
    expected = F.cross_entropy(alone, torch.tensor([0, 1, 2, 0, 1, 2]))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad[:, visible], alone.grad)
    assert (logits.grad[:, ~visible] == 0).all()


def test_the_mask_may_differ_from_row_to_row():
    logits, visible = normal(2, 3), torch.tensor([[True, True, False], [False, True, True]])
    assert masked_logits(logits, visible).softmax(1)[~visible].eq(0).all()


def test_cross_entropy_is_the_mean_over_the_labelled_rows():
    logits, labels = normal(5, 3), torch.tensor([1, -1, 2, -1, 0])
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits[[0, 2, 4]], labels[[0, 2, 4]]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_of_rows_are_factors_without_gradient(smoothing: float):
    logits, labels = normal(4, 3), torch.tensor([0, 2, -1, 1])
    weights = torch.tensor([0.5, 0.0, 7.0, 2.0], dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(logits, labels, label_smoothing=smoothing, weights=weights)
    rows = F.cross_entropy(logits[[0, 1, 3]], labels[[0, 1, 3]], reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss, (0.5 * rows[0] + 2 * rows[2]) / 3)
    assert not loss.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_labelled_row_loss_and_gradient_are_zero(smoothing: float):
    logits = normal(4, 3, requires_grad=True)
    visible = torch.tensor([False, True, True])  # label -1 must not be read as the hidden column 0
    loss = cross_entropy(masked_logits(logits, visible), torch.full((4,), -1), label_smoothing=smoothing)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_label_smoothing_is_spread_over_the_visible_classes():
    logits, labels = normal(6, 5, requires_grad=True), torch.tensor([0, 2, 3, 0, 2, 3])
    plain = cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels, label_smoothing=0.2))
    visible = torch.tensor([True, False, True, True, False])
    masked = cross_entropy(masked_logits(logits, visible), labels, label_smoothing=0.2)
    of_visible = F.cross_entropy(logits[:, visible], torch.tensor([0, 1, 2, 0, 1, 2]), label_smoothing=0.2)
    torch.testing.assert_close(masked, of_visible)
    (gradient,) = torch.autograd.grad(masked, logits)
    assert (gradient[:, ~visible] == 0).all()
    assert gradient.isfinite().all()


def test_gradient_of_binary_cross_entropy_is_its_closed_form():
    logits, targets = normal(4, 6, requires_grad=True), normal(4, 6, seed=1).sigmoid()
    binary_cross_entropy(logits, targets).backward()
    torch.testing.assert_close(logits.grad, (logits.sigmoid() - targets) / 4)


def test_targets_of_lwf_mc_are_one_hot_with_the_teacher_in_place_of_the_old_classes():
    teacher = normal(2, 2)
    targets = lwf_mc_targets(torch.tensor([3, 0]), 4, teacher)
    expected = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.float64)
    expected[:, :2] = teacher.sigmoid()
    torch.testing.assert_close(targets, expected)
    one_hot = lwf_mc_targets(torch.tensor([3, 0]), 4)
    torch.testing.assert_close(one_hot, F.one_hot(torch.tensor([3, 0]), 4).float())


@pytest.mark.parametrize("form", ["ce", "kl"])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradient_of_distillation_is_its_closed_form(form, scaled):
    student, teacher = normal(4, 5, requires_grad=True), normal(4, 5, seed=1)
    softmax_distillation(student, teacher, 3.0, form=form, scale_by_temperature=scaled).backward()
    expected = ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / (3 * 4) * (9 if scaled else 1)
    torch.testing.assert_close(student.grad, expected)


def test_the_two_forms_differ_by_the_teachers_entropy():
    student, teacher = normal(4, 5), normal(4, 5, seed=1)
    q = (teacher / 2).softmax(1)
    entropy = -(q * q.log()).sum(1).mean()
    ce, kl = (softmax_distillation(student, teacher, 2.0, form=form) for form in ("ce", "kl"))
    torch.testing.assert_close(ce, kl + entropy)
    torch.testing.assert_close(kl, F.kl_div((student / 2).log_softmax(1), q, reduction="batchmean"))
    scaled = softmax_distillation(student, teacher, 2.0, form="kl", scale_by_temperature=True)
    torch.testing.assert_close(scaled, 4 * kl)


def test_temperature_is_raising_probabilities_to_its_inverse_and_normalising():
    student, teacher = normal(4, 5), normal(4, 5, seed=1)
    p, q = (z.softmax(1) ** (1 / 2) for z in (student, teacher))  # how FACIL and the original write it
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    torch.testing.assert_close(softmax_distillation(student, teacher, 2.0), -(q * p.log()).sum(1).mean())


@pytest.mark.parametrize("groups", [[(0, 1), (2, 3, 4)], [(4, 1), (0, 3, 2)]])
def test_one_softmax_per_group_sums_the_groups(groups):
    student, teacher = normal(4, 5), normal(4, 5, seed=1)
    parts = [softmax_distillation(student[:, list(g)], teacher[:, list(g)], 2.0, form="kl") for g in groups]
    torch.testing.assert_close(
        softmax_distillation(student, teacher, 2.0, form="kl", groups=groups), parts[0] + parts[1]
    )


def test_a_student_that_is_its_teacher_has_no_distillation_gradient():
    student = normal(4, 5, requires_grad=True)
    teacher = student.detach().clone()
    for loss in (
        softmax_distillation(student, teacher),
        softmax_distillation(student, teacher, form="kl"),
        sigmoid_distillation(student, teacher),
        feature_distillation(student, teacher),
        cosine_feature_distillation(student, teacher),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient, torch.zeros_like(student), atol=1e-15, rtol=0)
    assert softmax_distillation(student, teacher, form="kl").item() == 0
    assert feature_distillation(student, teacher).item() == 0


def test_sigmoid_distillation_is_the_old_part_of_lwf_mc():
    student, teacher, labels = normal(4, 5), normal(4, 3, seed=1), torch.tensor([3, 4, 4, 3])
    whole = binary_cross_entropy(student, lwf_mc_targets(labels, 5, teacher))
    new = binary_cross_entropy(student[:, 3:], F.one_hot(labels - 3, 2))
    torch.testing.assert_close(whole, sigmoid_distillation(student[:, :3], teacher) + new)


def test_feature_distillation_is_the_mean_squared_norm_and_takes_a_metric():
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.zeros(2, 2)
    assert feature_distillation(student, teacher).item() == pytest.approx((25 + 1) / 2)
    metric = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    expected = (2 * 9 + 2 * 12 + 3 * 16 + 2) / 2
    assert feature_distillation(student, teacher, metric).item() == pytest.approx(expected)
    f, g = normal(4, 3), normal(4, 3, seed=1)
    torch.testing.assert_close(
        feature_distillation(f, g, 0.1 * torch.eye(3, dtype=torch.float64)), 0.1 * feature_distillation(f, g)
    )


def test_pod_spatial_compares_normalised_sums_of_squares_over_rows_and_columns():
    student, teacher = (torch.tensor([[[[1.0, 2], [0, 1]]]]).double(), torch.tensor([[[[3.0, 0], [0, 0]]]]).double())
    # Sums of squares over rows, then over columns: 5, 1, 1, 5 of norm sqrt(52), and 9, 0, 9, 0 of norm sqrt(162).
    one = torch.tensor([5.0, 1, 1, 5]).double() / math.sqrt(52)
    other = torch.tensor([1.0, 0, 1, 0]).double() / math.sqrt(2)
    torch.testing.assert_close(pod_spatial([student], [teacher]), (one - other).norm())
    more = [normal(3, 4, 5, 2, seed=0)], [normal(3, 4, 5, 2, seed=1)]
    flat = []
    for maps in (*more[0], *more[1]):
        rows = [torch.cat([m.square().sum(2).flatten(), m.square().sum(1).flatten()]) for m in maps]
        flat.append(torch.stack([row / row.norm() for row in rows]))
    expected = (flat[0] - flat[1]).norm(dim=1).mean()
    torch.testing.assert_close(pod_spatial(*more), expected)
    torch.testing.assert_close(
        pod_spatial([student, *more[0]], [teacher, *more[1]]), (expected + (one - other).norm()) / 2
    )


def test_pod_spatial_is_0_for_equal_maps_and_sees_no_factor_of_a_map():
    student = normal(3, 4, 5, 2, requires_grad=True)
    loss = pod_spatial([student], [student])
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))
    teacher = normal(3, 4, 5, 2, seed=1)
    factors = torch.tensor([-2.0, 0.5, 3.0]).double()[:, None, None, None]
    torch.testing.assert_close(pod_spatial([factors * student], [teacher]), pod_spatial([student], [teacher]))
    swapped = student.detach().clone()
    swapped[:, 0] = torch.eye(5, dtype=torch.float64)[:, :2]
    other = swapped.clone()
    other[:, 0, :2] = other[:, 0, [1, 0]]  # a diagonal becomes the other one
    assert pod_spatial([swapped], [other]).item() < 1e-15
    assert not torch.equal(swapped, other)


def test_pod_spatial_has_no_gradient_in_the_teacher_and_takes_maps_of_equal_shapes():
    student, teacher = normal(2, 3, 4, 4, requires_grad=True), normal(2, 3, 4, 4, seed=1, requires_grad=True)
    pod_spatial([student], [teacher]).backward()
    assert teacher.grad is None
    for own, other in (([], []), ([student], []), ([student], [teacher[:, :1]])):
        with pytest.raises(ValueError, match="pod_spatial: "):
            pod_spatial(own, other)


def test_the_mean_over_selected_rows_is_0_without_any_and_has_a_gradient():
    values, batch = normal(4, requires_grad=True), batch_of(torch.arange(4))
    chosen = torch.tensor([True, False, True, False])
    torch.testing.assert_close(mean_over_selected(values, chosen, batch), (values[0] + values[2]) / 2)
    none = mean_over_selected(values, torch.zeros(4, dtype=torch.bool), batch)
    assert none.item() == 0
    none.backward()
    assert torch.equal(values.grad, torch.zeros_like(values))


def test_means_over_selected_rows_of_two_processes_add_up_to_the_mean_over_all(monkeypatch):
    values, chosen = normal(5), torch.tensor([True, False, True, True, False])
    module = "cl_lightning.losses.classification"
    monkeypatch.setattr(f"{module}.world_size", lambda: 2)
    monkeypatch.setattr(f"{module}.all_sum", lambda count: torch.tensor(3))
    found = 0
    for rows in (slice(0, 2), slice(2, 5)):
        batch = batch_of(torch.arange(5)).select(rows)
        batch = batch.replace(weight=len(batch) * 2 / 5)
        found = found + batch.weight * mean_over_selected(values[rows], chosen[rows], batch) / 2
    torch.testing.assert_close(found, values[chosen].mean())
    single = batch_of(torch.arange(1))  # fewer rows than processes: nothing is exchanged
    torch.testing.assert_close(mean_over_selected(values[:1], chosen[:1], single), values[0])


def test_cosine_feature_distillation_sees_directions_only():
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    assert cosine_feature_distillation(student, teacher).item() == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_no_gradient_reaches_the_teacher():
    student, teacher = normal(4, 5, requires_grad=True), normal(4, 5, seed=1, requires_grad=True)
    losses = [f(student, teacher) for f in (softmax_distillation, sigmoid_distillation, feature_distillation)]
    losses += [cosine_feature_distillation(student, teacher)]
    torch.stack(losses).sum().backward()
    assert teacher.grad is None
    assert not lwf_mc_targets(torch.tensor([4, 4, 4, 4]), 6, teacher).requires_grad


def test_losses_are_float32_under_autocast_and_for_half_precision_logits():
    student, teacher, metric = (normal(4, 4, seed=s).bfloat16() for s in range(3))
    exact = [feature_distillation(student.double(), teacher.double(), metric.double())]
    exact += [f(student.double(), teacher.double()) for f in (softmax_distillation, sigmoid_distillation)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [feature_distillation(student, teacher, metric)]
        losses += [f(student, teacher) for f in (softmax_distillation, sigmoid_distillation)]
    for loss, value in zip(losses, exact, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_adds_nothing():
    empty = torch.zeros(0, 3)
    for loss in (softmax_distillation(empty, empty), binary_cross_entropy(empty, empty)):
        assert loss.item() == 0
    assert cross_entropy(empty, torch.zeros(0, dtype=torch.int64)).item() == 0


@pytest.mark.parametrize(
    "loss", [softmax_distillation, sigmoid_distillation, feature_distillation, cosine_feature_distillation]
)
def test_a_teacher_that_knows_fewer_classes_is_an_error_that_says_what_to_do(loss):
    for fewer in (3, 1):  # 1 would be broadcast
        with pytest.raises(ValueError, match=rf"{loss.__name__}: .*student\[:, : teacher.shape\[1\]\]"):
            loss(torch.zeros(2, 5), torch.zeros(2, fewer))


def test_the_mean_over_a_single_row_is_its_value():
    student, teacher, labels = normal(1, 3), normal(1, 3, seed=1), torch.tensor([2])
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    torch.testing.assert_close(softmax_distillation(student, teacher), -(q * p.log()).sum())  # T is 2
    for rows in (student, torch.cat([teacher, student])):
        hidden = F.pad(labels, (len(rows) - 1, 0), value=-1)
        torch.testing.assert_close(cross_entropy(rows, hidden), -student.log_softmax(1)[0, 2])


def test_the_norm_of_feature_differences_is_of_all_rows_as_one_vector_with_gradient_to_the_student():
    student, teacher, batch = normal(3, 2, requires_grad=True), normal(3, 2, seed=1), batch_of(torch.zeros(3).long())
    loss = feature_norm_distillation(student, teacher.requires_grad_(), batch)
    gap = (student - teacher).detach()
    torch.testing.assert_close(loss.detach(), sum(gap.flatten() ** 2) ** 0.5)
    loss.backward()
    torch.testing.assert_close(student.grad, gap / gap.norm())
    assert teacher.grad is None
    half = batch.replace(weight=0.5)  # the strategy multiplies by the weight
    torch.testing.assert_close(0.5 * feature_norm_distillation(student, teacher, half), loss)
    same = student.detach().clone().requires_grad_()
    feature_norm_distillation(same, student, batch).backward()
    assert torch.equal(same.grad, torch.zeros_like(same))


def test_the_contrast_of_two_views_is_info_nce_and_may_be_with_a_teacher():
    z, v = normal(4, 3, requires_grad=True), normal(4, 3, seed=1, requires_grad=True)
    images = torch.tensor([0, 1, 0, 1])
    for targets in (None, v):
        other, expected = z if targets is None else v, 0.0
        for i, j in ((0, 2), (1, 3), (2, 0), (3, 1)):
            shares = [(z[i] @ other[a] / (z[i].norm() * other[a].norm()) / 0.2).exp() for a in range(4)]
            expected = expected - (shares[j] / sum(shares[a] for a in range(4) if a != i)).log() / 4
        loss = supervised_contrastive(z, images, 0.2, base_temperature=0.2, targets=targets)
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        supervised_contrastive(z, images, targets=z.detach()), supervised_contrastive(z.detach(), images)
    )
    gradients = torch.autograd.grad(loss, (z, v), allow_unused=True)
    assert gradients[0].abs().min() > 0
    assert gradients[1] is None


def test_the_factor_of_some_rows_makes_their_sum_a_mean():
    batch = batch_of(torch.zeros(8, dtype=torch.int64))
    assert float(row_factor(torch.tensor(5), batch)) == pytest.approx(1 / 5)
    assert float(row_factor(torch.tensor(0), batch)) == 1
    assert float(row_factor(torch.tensor(5), batch.replace(weight=0.5))) == pytest.approx(2 / 5)


def test_on_one_process_the_rows_of_all_are_the_rows():
    rows, factor = rows_of_all(batch_of(torch.zeros(8, dtype=torch.int64)).replace(weight=0.5))
    z = normal(4, 2)
    assert rows(z) is z
    assert factor == 2


def test_dot_regression_is_its_closed_form_and_ignores_hidden_labels():
    cosines = torch.tensor([[0.5, -1.0], [1.0, 0.0], [0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, -1])
    loss = dot_regression(cosines, labels)
    assert float(loss) == pytest.approx((0.5 * 0.25 + 0.5 * 1.0) / 2)
    loss.backward()
    expected = torch.tensor([[-0.25, 0.0], [0.0, -0.5], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(cosines.grad, expected)
    weighted = dot_regression(cosines, labels, weights=torch.tensor([4.0, 2.0, 9.0]))
    assert float(weighted) == pytest.approx((4 * 0.5 * 0.25 + 2 * 0.5 * 1.0) / 2)
    assert float(dot_regression(cosines, torch.full((3,), -1))) == 0.0
    assert float(dot_regression(torch.ones(2, 3), torch.tensor([0, 2]))) == 0.0
