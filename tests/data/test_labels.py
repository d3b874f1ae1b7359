"""Labels as users write them: what is understood, what is refused, and in which words."""

import numpy as np
import pytest
import torch

from cl_lightning.data.labels import Classes, plain_labels


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([1, 2, 3, 2], [0, 1, 2, 1], ("1", "2", "3")),
        ([0, 1, 12, 12], [0, 1, 2, 2], ("0", "1", "12")),
        ([10**12, 5, 5, 5], [1, 0, 0, 0], ("5", str(10**12))),
        (np.array([2.0, 0.0, 1.0]), [2, 0, 1], ("0", "1", "2")),
        (["dog", "ant", "bee"], [2, 0, 1], ("ant", "bee", "dog")),
        (np.array(["b", "a"], dtype=object), [1, 0], ("a", "b")),
        ([b"b", b"\xc3\xa4"], [0, 1], ("b", "\u00e4")),
        ([True, False], [1, 0], ("False", "True")),
        ([torch.tensor(4), torch.tensor(7)], [0, 1], ("4", "7")),
        (torch.tensor([[3], [1]]), [1, 0], ("1", "3")),
        (torch.tensor([3.0, 1.0], dtype=torch.bfloat16), [1, 0], ("1", "3")),
        (torch.eye(3)[[2, 0, 1]], [2, 0, 1], ("0", "1", "2")),
        ([torch.tensor([0, 1]), torch.tensor([1, 0])], [1, 0], ("0", "1")),
    ],
)
def test_labels_that_occur_are_the_classes_in_ascending_order(labels, numbers, names):
    classes = Classes.of(labels, len(labels), None, "x")
    assert classes.names == names
    assert classes.number(labels, len(labels), "x").tolist() == numbers
    assert classes.number(labels, len(labels), "x").dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([0, 2], ("a", "b", "c"), [0, 2]),
        ([1, 3], ("a", "b", "c"), [0, 2]),  # 3 occurs and 0 does not: counted from 1
        ([1, 2], ("a", "b", "c"), [1, 2]),
        (["c", "a"], ("c", "b", "a"), [0, 2]),
    ],
)
def test_labels_count_the_names_where_there_are_names(labels, names, numbers):
    classes = Classes.of(labels, 2, names, "x")
    assert (classes.names, classes.number(labels, 2, "x").tolist()) == (names, numbers)


def test_test_samples_are_numbered_by_the_classes_of_the_training_samples():
    classes = Classes.of([3, 5, 9], 3, None, "x")
    assert classes.number([9, 3], 2, "y").tolist() == [2, 0]
    for labels, message in (
        ([9, 4], r"y: label 4 of sample 1 is no class of the training samples \(3, 5, 9\)"),
        (["9", "3"], "y: labels are strings, labels of the training samples numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            classes.number(labels, 2, "y")


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0.0, 0.37], None, r"sample 1 is 0\.37, a value to be predicted \(regression\)"),
        ([0.0, np.nan], None, "the label of sample 1 is nan; remove such samples"),
        (["a", None], None, "the label of sample 1 is None; remove such samples|strings and numbers are mixed"),
        (["a", 1], None, "strings and numbers are mixed"),
        ([0, -1], None, "label -1 of sample 1 .* negative labels usually mark samples without a label"),
        ([[1, 0, 1], [0, 1, 0]], None, r"sample 0, \(1, 0, 1\), has 2 classes: several labels per sample"),
        ([[0, 0], [0, 1]], None, r"sample 0, \(0, 0\), has 0 classes"),
        ([[0.9, 0.1], [0.5, 0.5]], None, r"\(0\.9, 0\.1\), is a row of probabilities"),
        ([[3, 1], [0, 1]], None, r"\(3, 1\), has several numbers per sample"),
        ([[1], [1, 2]], None, "labels are no array of numbers"),
        ([0, 1, 2], None, r"labels are int64 of shape \(3,\); give 2 labels, one per image"),
        (
            [0, 3],
            ("a", "b"),
            r"label 3 of sample 1 .* labels are 0 \.\. 1, or 1 \.\. 2 throughout, as there are 2 class",
        ),
        ([0, 2], ("a", "b"), "label 2 of sample 1 is outside the range"),  # 0 occurs: not counted from 1
        (["a", "z"], ("a", "b"), r"the label 'z' is not among the class names \(a, b\)"),
        (np.array([{}, []], dtype=object), None, "labels are of the types dict, list|labels are no array"),
    ],
)
def test_what_is_no_label_is_refused_in_its_own_words(labels, names, message):
    with pytest.raises(ValueError, match=message) as raised:
        Classes.of(labels, 2, names, "x")
    assert str(raised.value).startswith("x: ")
    assert "\n" not in str(raised.value)


def test_plain_labels_are_one_per_sample():
    assert plain_labels(np.array([[1], [2]], np.uint8), 2, "x").tolist() == [1, 2]
    assert plain_labels([], 0, "x").shape == (0,)
