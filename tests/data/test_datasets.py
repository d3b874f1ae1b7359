"""Data sets of users: where items hold image and label, and how arrays are read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from cl_lightning.data import DatasetSource
from cl_lightning.data.datasets import Fields, find_fields, image_of

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


class Pairs(Dataset):
    def __init__(self, *labels: object, **attributes: object) -> None:
        self.own, self.reads = labels, 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, place: int) -> tuple:
        self.reads += 1
        return PICTURE, self.own[place]


Picture = type("Image", (), {})  # types of columns are known by their names


class ClassLabel:
    def __init__(self, names: list[str]) -> None:
        self.names = names


class Columns:
    """A data set of Hugging Face: items are dicts, and a column is read by its name."""

    def __init__(self, features: dict[str, object], count: int = 6, **columns: list) -> None:
        self.features, self.column_names, self.count, self.columns = features, list(features), count, columns
        self.reads = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int | str) -> object:
        if isinstance(key, str):
            return self.columns[key]
        self.reads += 1
        pictures = {name: PICTURE for name, kind in self.features.items() if type(kind).__name__ == "Image"}
        return {**{name: column[key] for name, column in self.columns.items()}, **pictures}


def test_columns_of_hugging_face_are_found_by_their_types_without_reading_images():
    features = {"id": SimpleNamespace(), "picture of it": Picture(), "kind": ClassLabel(["ant", "bee"])}
    source = DatasetSource(Columns(features, id=list(range(6)), kind=[0, 1] * 3))
    assert (source.fields, source.class_names) == (Fields("picture of it", "kind"), ("ant", "bee"))
    assert source.labels.tolist() == [0, 1] * 3
    assert source.dataset.reads == 1  # the first item, for its keys
    assert source.take(torch.tensor([0])).shape == (1, 3, 4, 4)


def test_several_columns_of_labels_are_ambiguous_unless_one_is_given():
    features = {"img": Picture(), "fine_label": ClassLabel(list("abc")), "coarse_label": ClassLabel(["x", "y"])}
    data = Columns(features, fine_label=[0, 1, 2] * 2, coarse_label=[0, 1] * 3)
    with pytest.raises(
        ValueError, match=r"each of 'fine_label', 'coarse_label' may be the label; give data\.label_key"
    ):
        DatasetSource(data)
    source = DatasetSource(data, label_key="coarse_label")
    assert (source.class_names, source.labels.tolist()) == (("x", "y"), [0, 1] * 3)
    with pytest.raises(
        ValueError, match="label_key is 'kind'; items have the keys 'fine_label', 'coarse_label', 'img'"
    ):
        DatasetSource(data, label_key="kind")


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((PICTURE, 1), Fields(0, 1)),
        ([PICTURE, 1, "more"], Fields(0, 1)),
        (PICTURE, Fields(None, None)),
        ((PICTURE,), Fields(0, None)),
        ({"image": PICTURE, "label": 1}, Fields("image", "label")),
        ({"jpg": PICTURE, "cls": 1, "url": "x"}, Fields("jpg", "cls")),
        ({"pixels": np.zeros((4, 4)), "species": "ant"}, Fields("pixels", "species")),
        ({"img": PICTURE, "mask": PICTURE, "target": torch.tensor(1)}, Fields("img", "target")),
        ({"x": torch.zeros(3, 4, 4), "y": 3, "index": 7}, Fields("x", "y")),
    ],
)
def test_places_of_image_and_label_are_found(item, expected):
    assert find_fields(item, None, None, None, name="x") == expected


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"a": PICTURE, "b": PICTURE, "label": 1}, "each of 'a', 'b' may be the image; give data.image_key"),
        ({"image": PICTURE, "label": 1, "target": 2}, "each of 'label', 'target' may be the label"),
        (
            {"image": PICTURE, "boxes": [[0, 1]]},
            "dicts of 'image', 'boxes', and none is the label; give data.label_key",
        ),
        ({"text": "a", "label": 1}, "dicts of 'text', 'label', and none is the image"),
        ((), r"items are empty; return \(image, label\)"),
    ],
)
def test_places_that_are_not_certain_are_refused(item, message):
    with pytest.raises(ValueError, match=message):
        find_fields(item, None, None, None, name="x")


def test_items_that_are_dicts_are_read():
    class Dicts(Pairs):
        def __getitem__(self, place: int) -> dict:
            return {"image": PICTURE, "label": self.own[place]}

    with pytest.warns(UserWarning, match="every item is read once"):
        source = DatasetSource(Dicts("dog", "ant"))
    assert (source.class_names, source.labels.tolist()) == (("ant", "dog"), [1, 0])
    assert source.take(torch.tensor([1])).shape == (1, 3, 4, 4)


def test_labels_are_found_behind_subsets_and_joined_sets_without_reading_items():
    first = Pairs(5, 7, 9, targets=[5, 7, 9])
    source = DatasetSource(Subset(first, [2, 0]))
    assert (source.class_names, source.labels.tolist(), first.reads) == (("5", "9"), [1, 0], 0)
    named = Pairs(0, 1, targets=[0, 1], classes=["a", "b"])
    joined = DatasetSource(ConcatDataset([Subset(named, [1]), named]))
    assert (joined.class_names, joined.labels.tolist(), named.reads) == (("a", "b"), [1, 0, 1], 0)
    with pytest.raises(ValueError, match=r"parts of a ConcatDataset have different `classes`; give data\.class_names"):
        DatasetSource(ConcatDataset([named, Pairs(0, targets=[0], classes=["z"])]))
    many = Pairs(0, 1, 2, 3, targets=[0, 1, 2, 3], classes=["a", "b", "c", "d"])
    some = DatasetSource(Subset(many, [3, 1]))
    assert (some.class_names, some.labels.tolist()) == (("b", "d"), [1, 0])
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert DatasetSource(TensorDataset(images, torch.eye(2))).labels.tolist() == [0, 1]


def test_items_without_a_label_need_the_attribute():
    class Alone(Pairs):
        def __getitem__(self, place: int) -> Image.Image:
            return PICTURE

    assert DatasetSource(Alone(1, 2, targets=["a", "b"])).take(torch.tensor([0])).shape == (1, 3, 4, 4)
    with (
        pytest.warns(UserWarning, match="no attribute `targets`"),
        pytest.raises(ValueError, match="items have no label; return"),
    ):
        DatasetSource(Alone(1, 2))


def test_domains_keep_their_values_as_names():
    source = DatasetSource(Pairs(0, 0, 0, targets=[0] * 3, domains=["sketch", "photo", "sketch"]))
    assert (source.domains.tolist(), source.domain_names) == ([1, 0, 1], ("photo", "sketch"))


IMAGE = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
FIRST = torch.from_numpy(IMAGE.transpose(2, 0, 1).copy())


@pytest.mark.parametrize(
    "item",
    [
        IMAGE,  # as OpenCV reads it
        np.frombuffer(IMAGE.tobytes(), np.uint8).reshape(IMAGE.shape),  # read-only
        FIRST,
        FIRST.permute(1, 2, 0),
        IMAGE.transpose(2, 0, 1),
        FIRST.long(),
        FIRST.float() / 255,  # ToTensor
        FIRST.double() / 255,
        (FIRST.float() / 255).half(),
        IMAGE.tolist(),
    ],
)
def test_pixels_of_other_types_and_orders_are_the_same_image(item):
    assert torch.equal(image_of(item), FIRST)


def test_images_without_colours_and_with_many_channels_are_read():
    assert image_of(np.zeros((5, 6), bool)).shape == (1, 5, 6)
    assert image_of(torch.ones(5, 6, dtype=torch.bool)).unique().tolist() == [255]
    assert image_of(torch.zeros(13, 8, 9, dtype=torch.uint8)).shape == (13, 8, 9)
    assert image_of(torch.zeros(3, 4, 3, dtype=torch.uint8)).shape == (3, 4, 3)
