import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import NAN, close, row_of
from torch import Tensor

from cl_lightning.measures import (
    AccuracyMatrix,
    EvaluationResult,
    StreamAccuracy,
    area_under_budget,
    average_accuracy,
    average_anytime_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    base_novel_harmonic,
    expected_calibration_error,
    forgetting_last,
    forgetting_max,
    forward_transfer,
    global_forgetting,
    intransigence,
    last_accuracy,
    lca,
    learning_accuracy,
    min_accuracy,
    old_new_accuracy,
    per_class_accuracy,
    performance_drop,
    performance_maintenance,
    transfer_contrast,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

# after task 0: 0.9; after task 1: 0.95 and 0.8; after task 2: 0.5, 0.4 and 0.7
MATRIX = torch.tensor([[0.9, NAN, NAN], [0.95, 0.8, NAN], [0.5, 0.4, 0.7]], dtype=torch.float64)
# the same with the future tasks evaluated too
FULL = torch.tensor([[0.9, 0.2, 0.0], [0.95, 0.8, 0.3], [0.5, 0.4, 0.7]], dtype=torch.float64)
TOTALS = torch.tensor([20, 10, 10])
ONE_TASK = torch.tensor([[0.75]], dtype=torch.float64)

TASK_COLUMNS = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
PREFIXES = [2, 5, 7]


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_pass(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties, labels, and the task that each label belongs to."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (rows, 7), generator=generator) / 2
    labels = torch.randint(7, (rows,), generator=generator)
    return scores, labels, TASK_COLUMNS[:, labels].int().argmax(0)


def measured(*passes: tuple[Tensor, Tensor, Tensor]) -> StreamAccuracy:
    metric = StreamAccuracy(3, 7, confusion=True, calibration=True, prefixes=PREFIXES)
    for scores, labels, tasks in passes:
        metric.update(scores, labels, tasks, TASK_COLUMNS)
    return metric


def assert_same(row: EvaluationResult, other: EvaluationResult) -> None:
    for name, value in vars(row).items():
        assert torch.equal(value.nan_to_num(-1), getattr(other, name).nan_to_num(-1)), name


def plain_row(scores: Tensor, labels: Tensor, tasks: Tensor) -> EvaluationResult:
    """Twin of StreamAccuracy, one sample at a time."""
    totals, correct, aware = [0] * 3, [0] * 3, [0] * 3
    confusion = [[0] * 7 for _ in range(7)]
    inside, hits = [0] * 3, [0] * 3
    bins: list[dict[int, list[tuple[int, float]]]] = [{}, {}, {}]
    for values, label, task in zip(scores.tolist(), labels.tolist(), tasks.tolist(), strict=True):
        guess = values.index(max(values))
        own = [c for c in range(7) if TASK_COLUMNS[task, c]]
        totals[task] += 1
        correct[task] += guess == label
        aware[task] += max(own, key=lambda c: values[c]) == label
        confusion[label][guess] += 1
        for k, end in enumerate(PREFIXES):
            if label < end:
                inside[k] += 1
                hits[k] += values.index(max(values[:end])) == label
        exponentials = [math.exp(v) for v in values]
        confidence = max(exponentials) / sum(exponentials)
        bins[task].setdefault(math.ceil(confidence * 15), []).append((guess == label, confidence))
    ece = [
        sum(abs(sum(hit - sure for hit, sure in members)) for members in found.values()) / total
        for found, total in zip(bins, totals, strict=True)
    ]
    prefix = torch.tensor([h / n for h, n in zip(hits, inside, strict=True)], dtype=torch.float64)
    return EvaluationResult(
        torch.tensor(totals),
        torch.tensor(correct),
        torch.tensor(aware),
        prefix,
        torch.tensor(confusion),
        torch.tensor(ece, dtype=torch.float64),
    )


# StreamAccuracy


def test_counts_match_a_plain_loop():
    data = random_pass(400)
    row = measured(*[tuple(part[i : i + 64] for part in data) for i in range(0, 400, 64)]).compute()
    expected = plain_row(*data)
    for name in ("totals", "correct", "correct_task_aware", "accuracy", "task_aware", "prefix", "confusion"):
        torch.testing.assert_close(getattr(row, name), getattr(expected, name), rtol=0, atol=0)
    torch.testing.assert_close(row.ece, expected.ece, rtol=0, atol=1e-6)  # confidences are single precision


def test_the_last_prefix_is_the_plain_accuracy():
    row = measured(random_pass(200)).compute()
    assert float(row.prefix[-1]) == int(row.correct.sum()) / 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_float_type_give_the_same_counts(dtype: torch.dtype):
    scores, labels, tasks = random_pass(100)
    assert_same(measured((scores.to(dtype), labels, tasks)).compute(), measured((scores, labels, tasks)).compute())


def test_a_row_of_one_task_keeps_its_dimension():
    metric = StreamAccuracy(1, 2, calibration=True, prefixes=[2])
    metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([0]), torch.ones(1, 2, dtype=torch.bool))
    row = metric.compute()
    assert row.accuracy.shape == row.task_aware.shape == row.ece.shape == row.prefix.shape == (1,)
    assert row.accuracy.dtype == torch.float64


def test_a_task_without_samples_is_nan_and_a_future_class_counts_as_wrong():
    metric = StreamAccuracy(3, 2, confusion=True)
    columns = torch.tensor([[True, True], [False, False], [True, True]])
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    metric.update(scores, torch.tensor([0, 2, 0]), torch.tensor([0, 1, 1]), columns)
    row = metric.compute()
    assert row.totals.tolist() == [1, 2, 0]
    assert row.accuracy.tolist()[:2] == [1.0, 0.5]  # class 2 is wrong; class 0, filed under task 1, is right
    assert row.task_aware.tolist()[:2] == [1.0, 0.0]  # task 1 has no columns yet
    assert row.accuracy[2].isnan()
    assert row.task_aware[2].isnan()
    assert row.confusion.tolist() == [[2, 0], [0, 0]]
    assert row.prefix is None
    assert row.ece is None


def test_states_of_two_uneven_shares_add_up_to_those_of_the_whole():
    data = random_pass(101)
    shares = [measured(tuple(part[:70] for part in data)), measured(tuple(part[70:] for part in data))]
    whole = measured(data)
    for name in ("counts", "confusion", "bins", "prefix"):
        assert torch.equal(getattr(shares[0], name) + getattr(shares[1], name), getattr(whole, name))


def _evaluate_share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = [slice(0, 70), slice(70, 101)][rank]
    row = measured(tuple(part[rows] for part in random_pass(101))).compute()
    torch.save(vars(row), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_uneven_shares_compute_what_one_does(tmp_path: Path):
    mp.spawn(_evaluate_share, args=(str(tmp_path),), nprocs=2)
    expected = measured(random_pass(101)).compute()
    for rank in range(2):
        row = EvaluationResult(torch.ones(1), torch.ones(1), torch.ones(1))
        vars(row).update(torch.load(tmp_path / f"{rank}.pt", weights_only=True))
        assert_same(row, expected)  # to the bit, the calibration error too


def test_mistaken_sizes_are_reported():
    with pytest.raises(ValueError, match="0 classes"):
        StreamAccuracy(1, 0)
    with pytest.raises(ValueError, match="do not decrease"):
        StreamAccuracy(2, 7, prefixes=[5, 3])
    with pytest.raises(ValueError, match="do not decrease"):
        StreamAccuracy(2, 7, prefixes=[5, 8])
    with pytest.raises(ValueError, match="make a new metric"):
        StreamAccuracy(3, 6).update(*random_pass(4), TASK_COLUMNS)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        last_accuracy(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="window 1"):
        windowed_forgetting(torch.zeros(3), 1)
    with pytest.raises(ValueError, match="task -2"):
        AccuracyMatrix().fill(-2, row_of([0.5]))


# Measures on the matrix, by hand


def test_accuracies_of_a_known_matrix():
    close(average_accuracy(MATRIX, 0), 0.9)
    close(average_accuracy(MATRIX, 1), 0.875)
    close(average_accuracy(MATRIX), 1.6 / 3)
    close(average_accuracy(MATRIX, 1, TOTALS), (20 * 0.95 + 10 * 0.8) / 30)
    close(last_accuracy(MATRIX, TOTALS), (20 * 0.5 + 10 * 0.4 + 10 * 0.7) / 40)
    close(average_incremental_accuracy(MATRIX), (0.9 + 0.875 + 1.6 / 3) / 3)
    close(average_incremental_accuracy(MATRIX, TOTALS), (0.9 + 0.9 + 0.525) / 3)
    close(learning_accuracy(MATRIX), 0.8)
    close(learning_accuracy(MATRIX, TOTALS), (18 + 8 + 7) / 40)
    close(performance_drop(MATRIX), 0.9 - 1.6 / 3)
    assert old_new_accuracy(MATRIX) == pytest.approx((0.45, 0.7))
    assert old_new_accuracy(MATRIX, 2, TOTALS) == pytest.approx((14 / 30, 0.7))
    assert old_new_accuracy(MATRIX, 1) == pytest.approx((0.95, 0.8))


def test_forgetting_and_transfer_of_a_known_matrix():
    close(forgetting_max(MATRIX), ((0.95 - 0.5) + (0.8 - 0.4)) / 2)
    close(forgetting_last(MATRIX), ((0.9 - 0.5) + (0.8 - 0.4)) / 2)
    close(backward_transfer(MATRIX), -0.4)
    close(forward_transfer(FULL, doubles(0.5, 0.1, 0.1)), ((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    close(forward_transfer(MATRIX, doubles(0.5, 0.1, 0.1)), NAN)  # future tasks were not evaluated
    close(intransigence(MATRIX, doubles(0.9, 0.9, 0.9)), 0.1)
    close(performance_maintenance(MATRIX), ((0.05 - 0.4) / 2 - 0.4) / 2)
    # 2 classes, then 1, then 1: after task 1 weight 2/3, after task 2 weights 2/4 and 1/4
    close(global_forgetting(MATRIX, torch.tensor([2, 1, 1])), (2 / 3 * -0.05 + 0.5 * 0.4 + 0.25 * 0.4) / 2)


def test_contrast_of_a_known_matrix():
    forward, backward = transfer_contrast(FULL, doubles(0.5, 0.1, 0.0))
    # performance 100 R + 1; the pair (0, 2) has accuracy 0 before and after, and is left out
    close(forward, ((21 - 11) / (21 + 11) + (31 - 1) / (31 + 1)) / 2)
    close(backward, ((96 - 91) / (96 + 91) + (51 - 96) / (51 + 96) + (41 - 81) / (41 + 81)) / 3)
    close(transfer_contrast(FULL)[0], 30 / 32)
    close(transfer_contrast(MATRIX)[0], NAN)
    close(transfer_contrast(MATRIX)[1], backward)


def test_a_learner_that_keeps_only_the_last_task_has_acc_one_over_t_and_bwt_minus_one():
    close(last_accuracy(torch.eye(4)), 1 / 4)
    close(backward_transfer(torch.eye(4)), -1.0)
    close(forgetting_max(torch.eye(4)), 1.0)
    close(performance_maintenance(torch.eye(4)), -1.0)


def test_a_learner_that_changes_nothing_neither_forgets_nor_transfers():
    still = torch.full((4, 4), 0.6)
    counts = torch.tensor([5, 1, 1, 1])
    for value in (
        forgetting_max(still),
        forgetting_last(still),
        backward_transfer(still),
        performance_maintenance(still),
        global_forgetting(still, counts),
        *transfer_contrast(still, still[0]),
        forward_transfer(still, still[0]),
    ):
        close(value, 0.0)


def test_one_task_has_accuracies_but_nothing_forgotten():
    for value in (
        average_accuracy(ONE_TASK),
        last_accuracy(ONE_TASK, torch.tensor([3])),
        average_incremental_accuracy(ONE_TASK),
        learning_accuracy(ONE_TASK),
        old_new_accuracy(ONE_TASK)[1],
        worst_case_accuracy(torch.tensor([[0.2], [0.75]]), torch.tensor([1])),
    ):
        close(value, 0.75)
    close(performance_drop(ONE_TASK), 0.0)
    close(intransigence(ONE_TASK, torch.tensor([1.0])), 0.25)
    for value in (
        old_new_accuracy(ONE_TASK)[0],
        old_new_accuracy(ONE_TASK, 0, torch.tensor([3]))[0],
        forgetting_max(ONE_TASK),
        forgetting_last(ONE_TASK),
        backward_transfer(ONE_TASK),
        forward_transfer(ONE_TASK, torch.tensor([0.5])),
        global_forgetting(ONE_TASK, torch.tensor([2])),
        performance_maintenance(ONE_TASK),
        *transfer_contrast(ONE_TASK),
        min_accuracy(torch.tensor([[0.2], [0.75]]), torch.tensor([1])),
    ):
        close(value, NAN)


def test_missing_entries_make_nan_but_tasks_without_samples_are_left_out_of_weighted_means():
    holes = torch.tensor([[0.5, NAN], [NAN, 0.7]])
    close(average_accuracy(holes), NAN)
    close(average_accuracy(holes, 1, torch.tensor([1, 1])), NAN)
    close(average_accuracy(holes.double(), 1, torch.tensor([0, 4])), float(torch.tensor(0.7)))
    close(forgetting_max(holes), NAN)
    close(average_accuracy(holes, 1, torch.tensor([0, 0])), NAN)


def test_base_and_novel_accuracies_are_means_over_classes():
    confusion = torch.tensor([[9, 1, 0, 0], [0, 10, 10, 0], [1, 2, 1, 0], [0, 0, 0, 0]])
    assert per_class_accuracy(confusion)[:3].tolist() == [0.9, 0.5, 0.25]
    assert per_class_accuracy(confusion)[3].isnan()
    assert base_novel_harmonic(confusion, 2) == pytest.approx((0.7, 0.25, 2 * 0.7 * 0.25 / 0.95))
    assert base_novel_harmonic(torch.tensor([1.0, 0.5, 0.0]), 2) == (0.75, 0.0, 0.0)
    assert base_novel_harmonic(torch.zeros(3), 2) == (0.0, 0.0, 0.0)
    base_only = base_novel_harmonic(torch.tensor([1.0, 0.5]), 2)
    assert base_only.base == 0.75
    assert math.isnan(base_only.novel)
    assert math.isnan(base_only.harmonic)


def test_few_shot_accuracy_follows_from_base_and_novel_on_balanced_test_data():
    accuracies = torch.rand(75, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    split = base_novel_harmonic(accuracies, 60)
    close((60 * split.base + 15 * split.novel) / 75, float(accuracies.mean()))


def test_calibration_error_of_two_bins():
    # 4 samples at 0.5 of which 3 right, 6 at 0.9 of which 3 right
    error = expected_calibration_error(torch.tensor([4, 6]), torch.tensor([3, 3]), doubles(2.0, 5.4))
    close(float(error), 0.4 * 0.25 + 0.6 * 0.4)
    assert expected_calibration_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)).isnan().all()


# Measures on curves, by hand


def test_the_worked_example_of_the_stability_gap():
    curve = doubles(0.9, 0.5, 0.8)
    close(windowed_forgetting(curve, 10), 0.4)
    close(windowed_plasticity(curve, 10), 0.3)
    curves = torch.stack([curve, doubles(NAN, 0.6, 0.7)], 1)
    close(min_accuracy(curves, torch.tensor([0, 2])), 0.5)
    close(worst_case_accuracy(curves, torch.tensor([0, 2])), (0.7 + 0.5) / 2)
    close(windowed_forgetting(curves, 10), (0.4 + 0.0) / 2)
    close(windowed_plasticity(curves, 10), (0.3 + 0.1) / 2)


def test_a_window_sees_only_its_own_evaluations():
    slope = doubles(0.9, 0.8, 0.6, 0.55, 0.5)
    for window, drop in ((2, 0.2), (3, 0.3), (4, 0.35), (5, 0.4), (9, 0.4)):
        close(windowed_forgetting(slope, window), drop)
        close(windowed_plasticity(slope, window), 0.0)
    close(windowed_forgetting(torch.tensor([NAN, NAN]), 2), NAN)


def test_minimum_leaves_out_the_time_of_learning_and_is_nan_if_nothing_came_after():
    curves = torch.tensor([[0.1, NAN], [0.8, NAN], [0.6, 0.3], [0.7, 0.9]], dtype=torch.float64)
    close(min_accuracy(curves, torch.tensor([1, 3])), 0.6)
    close(min_accuracy(curves[:2], torch.tensor([1, 3])), NAN)


def test_anytime_accuracy_learning_curve_and_budget():
    close(average_anytime_accuracy(torch.tensor([0.25, NAN, 0.75])), 0.5)
    curves = torch.tensor([[0.0, NAN], [0.5, NAN], [0.75, 0.25], [0.75, 0.75]], dtype=torch.float64)
    close(lca(curves, torch.tensor([0, 2]), 2), (0.25 + 0.5) / 2)
    close(lca(curves, torch.tensor([0, 2]), 3), 1.25 / 3)  # task 1 has two evaluations only
    close(lca(curves, torch.tensor([0, 2]), 9), NAN)
    close(area_under_budget(doubles(23.5, 7.6), doubles(0.7, 0.7)), 0.7 * 15.9)
    close(area_under_budget(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 0.5, 1.0])), 0.25 + 1.5)
    close(area_under_budget(torch.tensor([1.0]), torch.tensor([0.5])), NAN)


# Bounds


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    size = draw(st.integers(2, 5))
    values = draw(st.lists(st.floats(0, 1), min_size=size * size, max_size=size * size))
    return torch.tensor(values, dtype=torch.float64).reshape(size, size)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.integers(2, 7))
def test_measures_stay_within_their_bounds(values: Tensor, window: int):
    size, slack = len(values), 1e-9
    matrix = values.masked_fill(torch.ones_like(values, dtype=torch.bool).triu(1), NAN)
    counts = torch.arange(1, size + 1)
    for value in (
        last_accuracy(matrix),
        average_incremental_accuracy(matrix, counts),
        learning_accuracy(matrix),
        windowed_forgetting(values, window),
        windowed_plasticity(values, window),
        base_novel_harmonic(values[0], 1).harmonic,
    ):
        assert -slack <= value <= 1 + slack
    for value in (
        performance_drop(matrix, counts),
        forgetting_max(matrix),
        backward_transfer(matrix),
        forward_transfer(values, values[0]),
        global_forgetting(matrix, counts),
        performance_maintenance(matrix),
    ):
        assert -1 - slack <= value <= 1 + slack
    for value in transfer_contrast(values, values[0]):
        assert math.isnan(value) or -1 < value < 1
    assert forgetting_max(matrix) >= forgetting_last(matrix) - slack
    assert forgetting_last(matrix) == -backward_transfer(matrix)
    ends = torch.arange(size)  # one evaluation per task
    assert worst_case_accuracy(matrix, ends) <= last_accuracy(matrix) + slack
    best, worst = max(base_novel_harmonic(values[0], 1)[:2]), min(base_novel_harmonic(values[0], 1)[:2])
    assert worst - slack <= base_novel_harmonic(values[0], 1).harmonic <= best + slack
