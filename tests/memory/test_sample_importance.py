"""A memory that keeps the samples whose training lowers its loss most."""

import pytest
import torch
from support.fakes import normal

from cl_lightning.batch import Draw
from cl_lightning.memory import ImportanceMemory, credited, least_important, mean_decrease

NAN = float("nan")


def one_after_another(labels, arriving, importance, count):
    """The rule for each sample in turn, where all arriving samples count from the start."""
    held = list(range(len(labels)))
    gone = []
    for _ in range(count):
        sizes = {}
        for label in [labels[row] for row in held] + list(arriving):
            sizes[label] = sizes.get(label, 0) + 1
        row = min(held, key=lambda row: (-sizes[labels[row]], importance[row], row))
        held.remove(row)
        gone.append(row)
    return gone


@pytest.mark.parametrize("seed", range(20))
def test_the_least_important_sample_of_the_largest_class_leaves(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (12,), generator=generator)
    arriving = torch.randint(5, (1 + seed % 4,), generator=generator)
    importance = torch.randint(4, (12,), generator=generator).double()  # with ties
    for count in (1, 3, 12):
        found = least_important(labels, arriving, importance, count)
        assert found.tolist() == one_after_another(labels.tolist(), arriving.tolist(), importance.tolist(), count)


def test_an_arriving_sample_counts_for_its_class():
    labels, importance = torch.tensor([0, 0, 1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert least_important(labels, torch.tensor([1]), importance, 1).tolist() == [2]
    assert least_important(labels, torch.tensor([0]), importance, 1).tolist() == [0]
    assert least_important(labels, torch.tensor([7]), importance, 1).tolist() == [0]  # of two equal classes


def test_importance_is_an_average_of_the_decreases_that_the_used_samples_bring():
    importance, used = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, True, False])
    found = credited(importance, used, torch.tensor(0.5), momentum=0.75)
    torch.testing.assert_close(found, torch.tensor([1 + 0.25 * (0.5 - 1.5), 2 + 0.25 * (0.5 - 1.5), 6.0]))
    found = credited(importance, used, torch.tensor(0.5), momentum=0.75, released=True)
    torch.testing.assert_close(found, torch.tensor([1 + 0.25 * (0.5 + 1.5 / 2), 2 + 0.25 * (0.5 + 1.5 / 2), 6.0]))
    assert torch.equal(credited(importance, torch.zeros(3, dtype=torch.bool), torch.tensor(9.0)), importance)


def test_at_a_constant_loss_importances_decay_and_in_the_released_form_they_grow():
    used, nothing = torch.ones(16, dtype=torch.bool), torch.zeros((), dtype=torch.float64)
    mine = theirs = torch.ones(16, dtype=torch.float64)
    for _ in range(100):
        mine, theirs = credited(mine, used, nothing), credited(theirs, used, nothing, released=True)
    torch.testing.assert_close(mine, torch.full_like(mine, 0.9**100))
    torch.testing.assert_close(theirs, torch.full_like(theirs, (1 + 0.1 / 16) ** 100))  # 1.86
    for _ in range(300):
        mine = credited(mine, used, nothing + 0.7)
    torch.testing.assert_close(mine, torch.full_like(mine, 0.7))


def test_only_samples_with_both_losses_count_for_the_decrease():
    found = mean_decrease(torch.tensor([2.0, NAN, 5.0]), torch.tensor([1.5, 9.0, 3.0]))
    assert float(found) == pytest.approx((0.5 + 2.0) / 2)
    assert mean_decrease(torch.tensor([NAN]), torch.tensor([1.0])).isnan()


def filled(size, labels, **options):
    memory = ImportanceMemory(size, **options)
    add(memory, labels)
    return memory


def add(memory, labels, first=0):
    labels = torch.as_tensor(labels)
    images = torch.arange(first, first + len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    memory.add(images, labels, torch.zeros_like(labels), Draw.of(len(labels), first))


def numbers(memory):
    return memory.images[:, 0, 0, 0].tolist()


def test_a_new_sample_has_the_mean_importance_of_its_class_or_of_all_if_the_class_is_new():
    memory = filled(9, [0, 0, 1])
    assert memory.fields["importance"].tolist() == [0, 0, 0]
    memory.fields["importance"].copy_(torch.tensor([1.0, 2.0, 6.0]))
    add(memory, [0, 1, 5], first=3)
    assert memory.fields["importance"].tolist() == [1, 2, 6, 1.5, 6, 3]
    assert memory.fields["losses"].isnan().all()
    assert not memory.fields["used"].any()


@pytest.mark.parametrize("label", [0, 1])
def test_the_mean_of_equal_importances_is_this_importance_to_the_bit(label):
    memory = filled(30, [0] * 11)
    memory.fields["importance"].fill_(0.1)
    add(memory, [label], first=11)
    assert len(memory.fields["importance"].unique()) == 1


def test_an_arriving_sample_is_stored_and_takes_the_place_of_the_least_important_one():
    memory = filled(4, [0, 0, 0, 1])
    memory.fields["importance"].copy_(torch.tensor([0.3, 0.1, 0.2, 0.0]))
    add(memory, [1], first=4)
    assert numbers(memory) == [0, 2, 3, 4]
    assert memory.labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(memory.fields["importance"], torch.tensor([0.3, 0.2, 0.0, 0.0]))
    add(memory, [2], first=5)  # of two equal classes, the least important: number 3 before number 4
    assert numbers(memory) == [0, 2, 4, 5]
    add(memory, [7] * 6, first=10)
    assert numbers(memory) == [12, 13, 14, 15]
    assert int(memory.num_seen) == 10


def test_classes_of_a_long_stream_differ_by_at_most_one_sample():
    memory, labels = ImportanceMemory(20), torch.randint(6, (400,), generator=torch.Generator().manual_seed(0))
    for step, part in enumerate(labels.split(3)):
        add(memory, part)
        memory.use(torch.arange(len(memory))[:: step % 5 + 1])
        memory.credit(normal(len(memory), seed=step).float())
    counts = memory.counts(6)
    assert int(counts.sum()) == 20
    assert int(counts.max() - counts.min()) <= 1


def test_used_samples_are_credited_with_the_mean_decrease_of_the_samples_that_stayed():
    memory = filled(5, [0, 1, 2], momentum=0.5)
    memory.use(torch.tensor([0, 1]))
    memory.credit(torch.tensor([3.0, 2.0, 1.0]))
    assert memory.fields["importance"].tolist() == [0, 0, 0]  # no loss before: nothing is known
    assert not memory.fields["used"].any()
    add(memory, [3], first=3)
    memory.use(torch.tensor([0, 3]))
    memory.credit(torch.tensor([1.0, 1.5, 0.5, 9.0]))
    d = (2.0 + 0.5 + 0.5) / 3
    torch.testing.assert_close(memory.fields["importance"], torch.tensor([0.5 * d, 0.0, 0.0, 0.5 * d]))
    assert memory.fields["losses"].tolist() == [1, 1.5, 0.5, 9]


def test_some_of_the_rows_are_marked_as_used():
    memory = filled(5, [0, 1, 2, 3])
    memory.use(torch.tensor([0, 2, 2, 3]), torch.tensor([True, False, True, False]))
    assert memory.fields["used"].tolist() == [True, False, True, False]
    memory.use(torch.tensor([0, 3]), torch.tensor([False, True]))
    assert memory.fields["used"].tolist() == [True, False, True, True]


def test_a_window_has_the_decrease_since_its_begin():
    memory = filled(5, [0, 1])
    memory.credit(torch.tensor([3.0, 2.0]))
    assert memory.begin_window().isnan()
    memory.credit(torch.tensor([2.0, 2.0]))
    add(memory, [2], first=2)
    memory.credit(torch.tensor([2.0, 1.0, 7.0]))
    assert float(memory.begin_window()) == 1.0  # (1 + 1) / 2
    memory.credit(torch.tensor([2.0, 1.0, 4.0]))
    assert float(memory.begin_window()) == 1.0  # (0 + 0 + 3) / 3


def test_the_state_is_restored():
    memory = filled(4, [0, 0, 1, 1], momentum=0.5)
    memory.credit(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    memory.use(torch.tensor([1]))
    other = ImportanceMemory(1)
    other.load_state_dict(memory.state_dict())
    for name, value in memory.fields.items():
        torch.testing.assert_close(other.fields[name], value, equal_nan=True, rtol=0, atol=0)
