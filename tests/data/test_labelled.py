"""Steps with unlabelled and labelled samples, each with a batch size of its own."""

import pytest
import torch
from support.data_modules import Toy

from cl_lightning.batch import Draw
from cl_lightning.data import LabelledPlan, LabelledRows, apart, interleaved
from cl_lightning.memory import Memory, Ring
from cl_lightning.stream import ClassIncremental, LabelFraction

COLUMNS = torch.tensor([-1] * 10 + [0] * 3 + [1] * 2 + [0, 1])  # the last two are from a memory
REPLAYED = torch.arange(17) >= 15


def plan(labelled, batch_size=4, **options):
    rows = torch.arange(17) + 100
    return LabelledPlan(
        rows, rows // 110, columns=COLUMNS, replayed=REPLAYED, labelled=labelled, batch_size=batch_size, **options
    )


def columns_of(rows):
    return COLUMNS[rows.indices - 100]


def test_both_kinds_are_spread_evenly():
    assert interleaved(4, 2).tolist() == [False, True, False, False, True, False]
    assert interleaved(0, 2).tolist() == [True, True]
    assert interleaved(3, 0).tolist() == [False] * 3
    rows = interleaved(32, 8)
    assert [int(rows[start : start + 10].sum()) for start in (0, 10, 20, 30)] == [2, 2, 2, 2]


def test_an_epoch_is_one_pass_over_the_unlabelled_samples_and_each_step_has_its_labelled_ones():
    made = plan(LabelledRows(count=3))
    steps = list(made.epoch(0))
    assert len(made) == 3
    assert [rows.groups for rows in steps] == [(4, 3), (4, 3), (2, 3)]
    assert sorted(torch.cat([rows.indices[rows.hidden] for rows in steps]).tolist()) == list(range(100, 110))
    drawn = torch.cat([rows.indices[~rows.hidden] for rows in steps])
    assert sorted(drawn[:7].tolist()) == list(range(110, 117))  # one pass, then the next one
    assert all((columns_of(rows) >= 0).equal(~rows.hidden) for rows in steps)
    assert all(rows.tasks.equal(rows.indices // 110) for rows in steps)
    assert all(rows.weight == 1.0 for rows in steps)
    other = list(made.epoch(1))
    assert not torch.cat([rows.indices for rows in other]).equal(torch.cat([rows.indices for rows in steps]))


def test_more_labelled_samples_make_the_epoch_longer():
    made = plan(LabelledRows(count=1), batch_size=5)
    assert len(made) == 7
    steps = list(made.epoch(0))
    assert [rows.groups for rows in steps] == [(5, 1)] * 7
    assert sorted(int(rows.indices[~rows.hidden]) for rows in steps) == list(range(110, 117))
    first = torch.cat([rows.indices[rows.hidden] for rows in steps[:2]])
    assert sorted(first.tolist()) == list(range(100, 110))


def test_as_many_of_each_class_and_all_samples_of_the_task_without_their_labels():
    made = plan(LabelledRows(per_class=4, unlabelled="all"))
    steps = list(made.epoch(0))
    assert len(made) == 4
    assert sorted(torch.cat([rows.indices[rows.hidden] for rows in steps]).tolist()) == list(range(100, 115))
    for rows in steps:
        assert columns_of(rows)[~rows.hidden].bincount().tolist() == [4, 4]
    zeros = [rows.indices[~rows.hidden][columns_of(rows)[~rows.hidden] == 0].unique().tolist() for rows in steps]
    assert zeros == [[110, 111, 112, 115]] * 4  # the three of the task and the one of the memory


def test_without_labels_or_without_hidden_labels_a_step_has_the_other_samples():
    nothing = LabelledPlan(
        torch.arange(5),
        torch.zeros(5).long(),
        columns=torch.full((5,), -1),
        replayed=torch.zeros(5).bool(),
        labelled=LabelledRows(),
        batch_size=2,
    )
    assert [rows.groups for rows in nothing.epoch(0)] == [(2, 0), (2, 0), (1, 0)]
    all_known = LabelledPlan(
        torch.arange(5),
        torch.zeros(5).long(),
        columns=torch.zeros(5).long(),
        replayed=torch.zeros(5).bool(),
        labelled=LabelledRows(),
        batch_size=2,
    )
    assert [rows.groups for rows in all_known.epoch(0)] == [(0, 2)] * 3


def test_two_processes_have_the_rows_of_one_and_a_later_step_is_the_same():
    whole = list(plan(LabelledRows(count=3)).epoch(2))
    halves = [list(plan(LabelledRows(count=3), rank=rank, world=2).epoch(2)) for rank in (0, 1)]
    for step, first, second in zip(whole, *halves, strict=True):
        assert torch.cat([first.indices, second.indices]).equal(step.indices)
        assert torch.cat([first.hidden, second.hidden]).equal(step.hidden)
        assert first.weight + second.weight == pytest.approx(2.0)
        assert first.draw.key == step.draw.key
    (last,) = plan(LabelledRows(count=3)).epoch(2, first=2)
    assert last.indices.equal(whole[2].indices)


def loaded(labelled, memory=None, task=0):
    data = Toy(scenario=LabelFraction(ClassIncremental(tasks=2), fraction=0.25), batch_size=8)
    data.make_stream(0)
    data.begin(data.stream.tasks[task], with_unlabelled=True)
    data.begin_phase(0, memory, 0, labelled=labelled)
    return data


def test_the_batches_of_a_data_module_are_taken_apart():
    data = loaded(LabelledRows(count=4))
    hidden, truth = set(data.stream.unlabelled[0].tolist()), torch.as_tensor(data.samples(train=True).labels)
    batches = list(data.train_dataloader())
    assert len(batches) == 4  # 30 unlabelled samples
    for batch in batches:
        unlabelled, labelled = apart(batch)
        assert (unlabelled.labels == -1).all()
        assert set(unlabelled.indices.tolist()) <= hidden
        assert len(labelled) == labelled.draw.total == 4
        assert not hidden & set(labelled.indices.tolist())
        assert labelled.labels.equal(truth[labelled.indices])
        assert labelled.raw.equal(data.samples(train=True).take(labelled.indices))
        assert labelled.draw.key not in (unlabelled.draw.key, batch.draw.key)
        assert (labelled.weight, unlabelled.weight) == (1.0, 1.0)


def test_shares_of_the_parts_belong_to_two_processes():
    data = loaded(LabelledRows(count=4))
    batch = next(iter(data.train_dataloader()))
    halves = [
        apart(batch.select(rows).replace(draw=Draw(batch.draw.key, rows.start, rows.stop, 12)))
        for rows in (slice(0, 5), slice(5, 12))
    ]
    for whole, *parts in zip(apart(batch), *halves, strict=True):
        assert torch.cat([part.indices for part in parts]).equal(whole.indices)
        assert torch.cat([part.draw.rand(3) for part in parts]).equal(whole.draw.rand(3))


def test_rows_of_a_memory_are_among_the_labelled_ones():
    memory = Memory(6, Ring())
    raw, zeros = torch.full((6, 1, 6, 6), 7, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    memory.add(raw, zeros, zeros, Draw.of(6, 0))
    data = loaded(LabelledRows(per_class=2), memory, task=1)
    for batch in data.train_dataloader():
        unlabelled, labelled = apart(batch)
        assert labelled.labels.bincount().tolist() == [2, 0, 2, 2]
        assert (labelled.raw[labelled.labels == 0] == 7).all()
        assert (unlabelled.indices >= 0).all()


def test_true_labels_of_unlabelled_samples_reach_no_loader_of_the_training():
    data = loaded(LabelledRows())
    hidden = torch.as_tensor(data.stream.unlabelled[0].copy())
    served = torch.cat([batch.labels for batch in data.statistics_dataloader(indices=hidden)])
    assert served.tolist() == [-1] * len(hidden)
    evaluated = torch.cat([batch.labels for batch in data.test_dataloader()])
    assert (evaluated >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"per_class": 0}, "per_class is 0"),
        ({"count": 2, "per_class": 2}, "give count or per_class"),
        ({"unlabelled": "none"}, "unlabelled is 'none'"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"LabelledRows: {message}"):
        LabelledRows(**options)


def test_a_batch_of_another_phase_is_not_taken_apart():
    data = loaded(None)
    with pytest.raises(ValueError, match="the batch has no groups"):
        apart(next(iter(data.train_dataloader())))
