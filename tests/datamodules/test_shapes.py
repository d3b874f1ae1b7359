"""Images of shapes on textures."""

import numpy as np
import pytest
import torch

from cl_lightning.data import ColorJitter
from cl_lightning.datamodules.shapes import NAMES, Shapes

SMALL = {"train": 90, "test": 40, "size": 32}


def test_masks_and_labels_are_of_the_same_images():
    pixels, labels = Shapes(**SMALL), Shapes(**SMALL, targets="labels")
    for train in (True, False):
        masks, sets = (data.samples(train=train) for data in (pixels, labels))
        assert torch.equal(masks.images, sets.images)
        assert masks.class_names == ("background", *NAMES)
        assert sets.class_names == NAMES
        found = [(masks.targets.values == place + 1).flatten(1).any(1) for place in range(12)]
        assert torch.equal(torch.stack(found, 1), sets.targets.values)
        assert sets.targets.sets.sum(1).max() <= 3
    assert (pixels.target_kind, labels.target_kind) == ("pixels", "labels")


def test_images_depend_on_their_own_seed_alone():
    first, again, other = Shapes(**SMALL, seed=1), Shapes(**SMALL, seed=2), Shapes(**SMALL, data_seed=1)
    images = [data.samples(train=True).images for data in (first, again, other)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert not torch.equal(images[0][:40], first.samples(train=False).images)


def test_the_colour_is_that_of_the_class_unless_it_says_nothing():
    def spread(**options):
        source = Shapes(**{**SMALL, "train": 400}, most=1, noise=0.0, classes=2, **options).samples(train=True)
        images, masks = source.images.double() / 255, source.targets.values
        means = [
            torch.stack(
                [image[:, mask == 1].mean(1) for image, mask in zip(images, masks, strict=True) if (mask == 1).any()]
            )
        ]
        return float(means[0].std(0).mean())

    assert spread(jitter=0.0) < 0.01
    assert spread(jitter=0.05) < 0.1
    assert spread(jitter=None) > 0.15


def test_its_scenario_divides_the_classes_into_tasks():
    stream = Shapes(**SMALL).make_stream(0)
    assert [task.num_new for task in stream.tasks] == [4, 3, 3, 3]
    assert stream.class_names[0] == "background"
    assert [task.num_new for task in Shapes(**SMALL, targets="labels", classes=6).make_stream(0).tasks] == [2, 2, 2]
    assert len(Shapes(**SMALL, classes=5).make_stream(0).tasks) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "class"}, "targets"),
        ({"classes": 13}, r"2 \.\. 12"),
        ({"size": 8}, "size"),
        ({"jitter": -0.1}, "jitter"),
        ({"noise": 2.0}, "noise"),
        ({"most": 0}, "most"),
        ({"transforms": [ColorJitter()]}, "ColorJitter does more than move pixels"),
        ({"resize": 16}, "resize does not resize masks"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Shapes(**{**SMALL, **options}).make_stream(0)


def test_a_picture_has_its_shapes_where_its_mask_has_them():
    source = Shapes(train=20, test=1, noise=0.0, jitter=0.0).samples(train=True)
    images, masks = source.images.numpy(), source.targets.values.numpy()
    for image, mask in zip(images, masks, strict=True):
        for label in np.unique(mask[mask > 0]):
            assert len(np.unique(image[:, mask == label], axis=1)[0]) == 1
