"""Labels of two levels: superclasses first, then their classes."""

import numpy as np
import pytest
import torch
from support.runs import plain_net, run

from callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.data import TensorSource
from cl_lightning.data.feature_cache import identities
from cl_lightning.data.levels import TwoLevelSource, parents_of
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import DatasetInfo, LabelExpansion, Online, Subset

GROUPS = {"low": ["0", "1", "2", "3", "4"], "high": ["5", "6", "7", "8", "9"]}
PARENTS = (4, 5, 4, 5, -1, -1)  # a, b, c, d, even, odd


def info(per_class=10):
    fine = np.tile(np.arange(4), per_class)
    labels = np.concatenate([fine, np.array(PARENTS)[fine]])
    names = ("a", "b", "c", "d", "even", "odd")
    return DatasetInfo(labels, labels[: 8 * per_class], names, parents=PARENTS)


def test_superclasses_are_numbered_after_the_classes():
    assert parents_of(["a", "b", "c"], {"x": ["c", "a"], "y": ["b"]}, "data") == (3, 4, 3, -1, -1)
    base = TensorSource(torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 4, 4), [0, 1, 2, 0, 1])
    source = TwoLevelSource(base, {"x": ["2", "0"], "y": ["1"]})
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 3, 4, 3, 3, 4]
    assert source.class_names == ("0", "1", "2", "x", "y")
    assert source.take(torch.tensor([1, 6, 9]))[:, 0, 0, 0].tolist() == [1, 1, 4]
    assert source.digest(np.array([7, 3])) == base.digest(np.array([2, 3]))
    assert torch.equal(identities(source), identities(base).repeat(2))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["b"], "y": ["a"]}, "superclasses has 'a', which is the name of a class"),
        ({"x": ["a", "b"], "y": []}, "superclass 'y' has no classes"),
        ({"x": ["a", "q"]}, "superclass 'x' has 'q', which is no class"),
        ({"x": ["a", "b"], "y": ["b"]}, "class 'b' is given to a superclass twice"),
        ({"x": ["a"]}, "class 'b' has no superclass"),
        ({}, "class 'a' has no superclass"),
    ],
)
def test_each_class_has_one_superclass(groups, message):
    with pytest.raises(ValueError, match=f"Data: {message}"):
        parents_of(["a", "b"], groups, "Data")


def test_the_second_half_of_the_labels_are_the_superclasses_of_the_first():
    assert info().levels.tolist() == [1, 1, 1, 1, 0, 0]
    fine = np.arange(2)
    for labels, parents, message in (
        ([0, 1, 2, 3], (2, 2, -1, -1), "the second half of train_labels"),
        ([0, 1, 2], (2, 2, -1, -1), "the second half of train_labels"),
        ([0, 1, 2, 2], (2, 2, -1), "3 parents for 4 classes"),
        ([0, 1, 2, 2], (2, 9, -1, -1), "no superclass"),
        ([0, 1, 1, 0], (1, 0, -1, -1), "no superclass"),
    ):
        with pytest.raises(ValueError, match=message):
            DatasetInfo(np.array(labels), fine, ("a", "b", "x", "y"), parents=parents)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_disjoint_images_have_a_coarse_label_or_a_fine_one(share):
    data = info()
    stream = LabelExpansion(tasks=2, coarse_share=share, class_order=["d", "a", "c", "b"])(data, seed=0)
    assert stream.class_names == ("even", "odd", "d", "a", "c", "b")
    assert [task.num_new for task in stream.tasks] == [2, 2, 2]
    images = np.concatenate(stream.train) % 40
    assert sorted(images.tolist()) == list(range(40))
    assert (stream.train[0] >= 40).all()
    assert np.bincount(stream.train[0] % 4).tolist() == [10 * share] * 4  # of each class
    assert (np.concatenate(stream.train[1:]) < 40).all()
    assert sorted(np.concatenate(stream.test).tolist()) == list(range(80))  # each image with both labels
    assert (data.test_labels[stream.test[0]] >= 4).all()
    other = LabelExpansion(tasks=2, coarse_share=share)(data, seed=1)
    assert set(other.train[0].tolist()) != set(stream.train[0].tolist())


def test_a_class_of_one_image_has_it_with_its_fine_label():
    labels = np.array([0, 0, 0, 1, 2, 2, 2, 3])
    data = DatasetInfo(labels, np.arange(4), ("a", "b", "x", "y"), parents=(2, 3, -1, -1))
    stream = LabelExpansion(tasks=1, coarse_share=0.9)(data, seed=0)
    assert [len(part) for part in stream.train] == [2, 2]
    assert stream.class_names == ("x", "a", "b")


def test_shared_images_come_back_with_the_label_of_their_class():
    stream = LabelExpansion(tasks=4, images="shared")(info(), seed=0)
    assert sorted(stream.train[0].tolist()) == list(range(40, 80))
    assert sorted(np.concatenate(stream.train[1:]).tolist()) == list(range(40))
    with pytest.raises(ValueError, match=r"val_fraction is 0.2, but images is 'shared'"):
        LabelExpansion(tasks=4, images="shared")(info(), seed=0, val_fraction=0.2)
    held = LabelExpansion(tasks=4)(info(), seed=0, val_fraction=0.2)
    assert not set(np.concatenate(held.val) % 40) & set(np.concatenate(held.train) % 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 0}, "tasks must be at least 1"),
        ({"tasks": 3}, "4 classes do not split into 3 equal tasks"),
        ({"images": "both"}, "images 'both'; use disjoint or shared"),
        ({"coarse_share": 1.0}, "coarse_share must be above 0 and below 1"),
        ({"images": "shared", "coarse_share": 0.3}, "coarse_share is 0.3, but images is 'shared'"),
        ({"class_order": "none"}, "class_order 'none'"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=f"LabelExpansion: {message}"):
        LabelExpansion(**{"tasks": 2, **options})(info(), seed=0)


def test_labels_of_one_level_and_an_extension_are_errors():
    plain = DatasetInfo(np.arange(4), np.arange(4), ("a", "b", "c", "d"))
    with pytest.raises(ValueError, match=r"have one level; give data.superclasses"):
        LabelExpansion(tasks=2)(plain, seed=0)
    scenario, data = LabelExpansion(tasks=1), info()
    more = DatasetInfo(data.train_labels, data.test_labels, ("a", "b", "c", "e", "even", "odd"), parents=PARENTS)
    with pytest.raises(ValueError, match="the classes have changed"):
        scenario.extend(scenario(data, seed=0), more, seed=0)


class Coarse(ER):
    """Scores that are largest for a superclass, whatever the image."""

    def predict(self, images, tasks=None):
        scores = super().predict(images)
        return scores + 100 * (self.data.levels()[: scores.shape[1]] == 0)


def test_an_evaluation_compares_the_classes_of_one_level():
    scenario = Online(Subset(LabelExpansion(tasks=2), per_class=20), batch_size=10)
    curves = [ContinualEvaluation(every_n_samples=100) for _ in range(2)]
    made = [
        run(cls(backbone=plain_net), curve, data={"scenario": scenario, "superclasses": GROUPS}, max_epochs=1)
        for cls, curve in zip((ER, Coarse), curves, strict=True)
    ]
    assert torch.equal(made[0].matrix.R_ci.nan_to_num(-1), made[1].matrix.R_ci.nan_to_num(-1))
    assert torch.equal(curves[0].curves().nan_to_num(-1), curves[1].curves().nan_to_num(-1))
    assert made[0].matrix.R_ci[-1].min() > 0.1
    assert made[0].strategy.data.levels().tolist() == [0, 0, *[1] * 10]
    assert made[0].strategy.data.class_names[:3] == ("low", "high", "0")
