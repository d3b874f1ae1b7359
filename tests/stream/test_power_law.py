"""Streams in which earlier tasks come back by a power law of their age."""

import numpy as np
import pytest
from support.runs import plain_net, run

from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.stream import (
    ClassIncremental,
    DatasetInfo,
    LabelFraction,
    NoisyLabels,
    PermutedDomains,
    PowerLawRehearsal,
    RotatedDomains,
    Stream,
)
from cl_lightning.stream.rehearsal import apportioned

BASE = ClassIncremental(increment=2, class_order="random")


def folders(names="abcdefgh", per_class=50):
    names = tuple(sorted(names))
    labels = np.repeat(np.arange(len(names)), per_class)
    return DatasetInfo(labels, labels[::10], names)


def added(stream, plain):
    """Number of samples of each earlier task (columns) in each task (rows)."""
    return [[int(np.isin(part, own).sum()) for own in plain.train] for part in stream.train]


def test_shares_are_the_laws():
    power = PowerLawRehearsal(BASE, rate=2.0, offset=1.0).shares(3)  # ages 3, 2, 1
    np.testing.assert_allclose(power, np.array([1 / 16, 1 / 9, 1 / 4]) / (1 / 16 + 1 / 9 + 1 / 4))
    np.testing.assert_allclose(PowerLawRehearsal(BASE).shares(2), [1 / 3, 2 / 3])
    recency = PowerLawRehearsal(BASE, law="recency").shares(3)
    np.testing.assert_allclose(recency, np.array([10.0**4, 11.0**4, 12.0**4]) / (10.0**4 + 11.0**4 + 12.0**4))
    exponential = PowerLawRehearsal(BASE, law="exponential", rate=2.0).shares(2)
    np.testing.assert_allclose(exponential, np.exp([-1, -0.5]) / np.exp([-1, -0.5]).sum())
    np.testing.assert_allclose(PowerLawRehearsal(BASE, rate=0.0).shares(4), [0.25] * 4)
    np.testing.assert_allclose(PowerLawRehearsal(BASE, law="recency", rate=1.0).shares(4), [0.25] * 4)
    for law in ("power", "recency", "exponential"):
        shares = PowerLawRehearsal(BASE, law=law).shares(9)
        assert (np.diff(shares) > 0).all()
        assert shares.sum() == pytest.approx(1)
    assert np.isfinite(PowerLawRehearsal(BASE, law="exponential", rate=1e-4).shares(50)).all()


def test_whole_numbers_add_up_to_the_budget():
    assert apportioned(np.array([1.0, 1.0, 1.0]), 8).tolist() == [2, 3, 3]
    assert apportioned(np.array([1.0, 2.0, 3.0]), 6).tolist() == [1, 2, 3]
    assert apportioned(np.array([0.6, 0.3, 0.1]), 4).tolist() == [2, 1, 1]
    assert apportioned(np.array([0.5, 0.5]), 0).tolist() == [0, 0]


def test_tasks_have_their_own_samples_and_a_fraction_of_earlier_ones():
    info = folders()
    plain = BASE(info, seed=3, val_fraction=0.2)
    stream = PowerLawRehearsal(BASE, fraction=0.5)(info, seed=3, val_fraction=0.2)
    # 80 training samples, 40 of earlier tasks: by 1 / age
    assert added(stream, plain) == [[80, 0, 0, 0], [40, 80, 0, 0], [13, 27, 80, 0], [7, 11, 22, 80]]
    for task in range(4):
        assert np.array_equal(stream.val[task], plain.val[task])
        assert np.array_equal(stream.test[task], plain.test[task])
        assert set(info.train_labels[stream.train[task]]) == set(stream.tasks[task].classes)
        assert stream.tasks[task].num_new == 2
    assert stream.order == plain.order
    stream.check(info)
    assert Stream.from_dict(stream.to_dict()) == stream
    assert PowerLawRehearsal(BASE, fraction=0.0)(info, seed=3, val_fraction=0.2).hashes == plain.hashes


def test_each_task_draws_other_samples_and_so_does_each_seed():
    info = folders()
    stream, other = (PowerLawRehearsal(ClassIncremental(increment=2), fraction=0.5)(info, seed=seed) for seed in (0, 1))
    first = [set(part.tolist()) & set(range(100)) for part in stream.train[1:]]
    assert not first[1] <= first[0]
    assert first[0] != set(other.train[1].tolist()) & set(range(100))


def test_a_task_that_is_smaller_than_its_share_gives_all_samples():
    info = folders(per_class=10)
    stream = PowerLawRehearsal(ClassIncremental(increment=2), fraction=3.0)(info, seed=0)
    assert [len(part) for part in stream.train] == [20, 40, 60, 67]
    # the last task would have 11, 16 and 33 of the earlier ones, which have 20 each


def test_an_extension_keeps_the_earlier_tasks():
    old, new = folders("bdfh"), folders("abcdefgh")
    scenario = PowerLawRehearsal(ClassIncremental(increment=2, class_order="random"), fraction=0.3)
    before = scenario(old, seed=1, val_fraction=0.1)
    after = scenario.extend(Stream.from_dict(before.to_dict()), new, seed=2)
    assert len(after) == 4

    def named(stream, info, task):
        rows = stream.train[task]
        return sorted((info.class_names[info.train_labels[row]], int(row) % 50) for row in rows)

    for task in range(2):
        assert named(after, new, task) == named(before, old, task)
    assert len(after.train[3]) == 130


def test_fine_tuning_forgets_less_where_tasks_come_back():
    options = {"backbone": plain_net}
    base = ClassIncremental(tasks=5)
    plain, mine = (
        run(Finetune(**options), data={"scenario": scenario, "batch_size": 16}, max_epochs=3).matrix.measures()[
            "average_accuracy"
        ]
        for scenario in (base, PowerLawRehearsal(base, fraction=0.3))
    )
    assert mine > plain + 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerLawRehearsal(BASE, fraction=-0.1), "fraction must be at least 0 and finite, got -0.1"),
        (lambda: PowerLawRehearsal(BASE, fraction=float("nan")), "fraction must be at least 0 and finite, got nan"),
        (lambda: PowerLawRehearsal(BASE, law="linear"), "law 'linear'; use power, recency, exponential"),
        (lambda: PowerLawRehearsal(BASE, rate=-1.0), "rate must be at least 0 and finite, got -1.0"),
        (lambda: PowerLawRehearsal(BASE, law="exponential", rate=0.0), "rate must be above 0 for the exponential law"),
        (lambda: PowerLawRehearsal(BASE, offset=-1.0), "offset must be at least 0 and finite, got -1.0"),
        (lambda: PowerLawRehearsal(BASE, law="recency", offset=1.0), "offset is 1.0, but law is 'recency'; leave"),
        (lambda: PowerLawRehearsal(PermutedDomains(3))(folders(), seed=0), "images of the tasks are shifted"),
        (lambda: PowerLawRehearsal(RotatedDomains(tasks=3))(folders(), seed=0), "images of the tasks are shifted"),
        (lambda: PowerLawRehearsal(NoisyLabels(BASE, 0.2))(folders(), seed=0), "hidden or noisy already; put those"),
        (lambda: PowerLawRehearsal(LabelFraction(BASE, 0.2))(folders(), seed=0), "hidden or noisy already; put those"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=f"PowerLawRehearsal: .*{message}"):
        make()
