"""Features of the networks after each task, compared with one another."""

from functools import partial

import numpy as np
import pytest
import torch
from support.runs import assert_resumes, assert_same, plain_net, run, sgd

from cl_lightning.batch import Draw
from cl_lightning.callbacks.compatibility_matrix import CompatibilityMatrix, balanced_pairs, read_test_images
from cl_lightning.measures import retrieval_accuracy, verification_accuracy
from cl_lightning.models import MLP, SimplexHead
from cl_lightning.strategies.baselines.finetune import Finetune

SMALL = partial(Finetune, backbone=plain_net, optimizer=sgd)


@pytest.mark.parametrize("protocol", ["retrieval", "verification"])
def test_a_network_that_does_not_change_is_compatible_with_itself(protocol):
    matrix = CompatibilityMatrix(protocol=protocol, samples=200)
    run(SMALL(freeze_backbone=True), matrix, max_epochs=1)
    assert matrix.matrix.shape == (3, 3)
    below = matrix.matrix[torch.tril_indices(3, 3).unbind()]
    assert (below == below[0]).all()
    assert 0.5 < below[0] < 1
    measures = matrix.measures()
    assert measures["average_compatibility"] == 1.0
    assert measures["strict_compatibility"] == measures["backward_compatibility"] == 0.0
    assert measures["forward_compatibility"] == 0.0


class Noted(Finetune):
    """Keeps the embedded features of all test images at the end of each task."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.noted = []

    def end_task(self, task):
        super().end_task(task)
        data = self.trainer.datamodule
        raw = data.samples(train=False).images.float() / 255
        images = (raw - torch.tensor(data.mean)) / torch.tensor(data.std)
        self.noted.append(self.network.backbone(images).detach() @ self.network.head.projection.weight.T.detach())


def test_the_entries_are_those_of_the_networks_on_the_test_images():
    matrix = CompatibilityMatrix(samples=None)
    made = run(Noted(backbone=plain_net, optimizer=sgd, head=partial(SimplexHead, size=12)), matrix, max_epochs=1)
    labels = torch.as_tensor(np.array(made.datamodule.samples(train=False).labels))
    noted = made.strategy.noted
    for t in range(3):
        for k in range(t + 1):
            assert float(matrix.matrix[t, k]) == pytest.approx(retrieval_accuracy(noted[t], noted[k], labels), abs=0.01)
    assert matrix.matrix[0, 1:].isnan().all()
    found = made.results()["compatibility_matrix"]
    assert found["matrix"][0] == [float(matrix.matrix[0, 0]), None, None]
    assert found["measures"] == matrix.measures()
    assert made.results()["protocol"]["test_data_use"][-1] == "compatibility of features after each task"
    assert [gallery.shape for gallery in matrix.galleries] == [(len(labels), 11)] * 3


def test_verification_compares_the_pairs_of_the_two_networks():
    matrix = CompatibilityMatrix(protocol="verification", samples=100)
    made = run(SMALL(), matrix, max_epochs=1)
    source, images, (first, second) = matrix._chosen(made.trainer)
    labels = torch.as_tensor(np.array(source.labels))[images]
    same = labels[first] == labels[second]
    assert same.tolist() == [True, False] * 50
    queries, gallery = matrix.galleries[2], matrix.galleries[1]
    assert float(matrix.matrix[2, 1]) == verification_accuracy(queries[first], gallery[second], same)


def test_pairs_are_uniform_over_the_other_images():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    first, second = balanced_pairs(labels, 40001, Draw.of(1, 5))
    assert len(first) == 40000
    same = labels[first] == labels[second]
    assert same.tolist() == [True, False] * 20000
    assert (first != second).all()
    table = torch.zeros(2, 6, 6)
    table.index_put_((same.long(), first, second), torch.tensor(1 / 20000), accumulate=True)
    for kind, usable in ((1, [0, 1, 2, 4, 5]), (0, list(range(6)))):
        for row in usable:
            partners = [j for j in range(6) if j != row and bool(labels[j] == labels[row]) == bool(kind)]
            expected = torch.zeros(6)
            expected[partners] = 1 / len(usable) / len(partners)
            torch.testing.assert_close(table[kind, row], expected, atol=0.01, rtol=0)


def test_training_is_the_same_with_and_without_it():
    plain, watched = run(SMALL(), max_epochs=1), run(SMALL(), CompatibilityMatrix(), max_epochs=1)
    assert_same(plain.strategy.network.state_dict(), watched.strategy.network.state_dict())


def test_a_killed_run_is_resumed_with_its_galleries(tmp_path):
    assert_resumes(lambda: (SMALL(), [CompatibilityMatrix(samples=50)]), tmp_path)


def test_images_of_another_data_set_are_read_from_a_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "open.npz", x_test=images, y_test=np.arange(60) % 3)
    matrix = CompatibilityMatrix(path=str(tmp_path / "open.npz"))
    run(SMALL(), matrix, max_epochs=1, options={"stop_after_task": 1})
    assert [gallery.shape for gallery in matrix.galleries] == [(60, 16)] * 2
    np.savez(tmp_path / "lacks.npz", x_test=images)
    with pytest.raises(ValueError, match=r"lacks.npz: give a file with x_test and y_test; it has x_test"):
        read_test_images(str(tmp_path / "lacks.npz"))
    with pytest.raises(ValueError, match=r"CompatibilityMatrix: path .*nothing.npz: .*give an .npz file"):
        CompatibilityMatrix(path=str(tmp_path / "nothing.npz"))


def test_features_that_grow_are_refused():
    class Grows(Finetune):
        def begin_task(self, task):
            super().begin_task(task)
            if task.index == 1:
                self.network.backbone = MLP((1, 8, 8), hidden=(20,))
                self.network.head.resize(20)

    with pytest.raises(ValueError, match="the network has 20 features, and had 16 after the first task"):
        run(Grows(backbone=plain_net, optimizer=sgd), CompatibilityMatrix(), max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "search"}, "CompatibilityMatrix: protocol is 'search'; use 'retrieval' or 'verification'"),
        ({"samples": 10}, "CompatibilityMatrix: samples is 10"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        CompatibilityMatrix(**options)


def test_pairs_need_two_classes_and_two_images_of_one():
    for labels in ([0, 1, 2], [0, 0, 0]):
        with pytest.raises(ValueError, match="verification needs two images of a class, and two classes"):
            balanced_pairs(torch.tensor(labels), 10, Draw.of(1, 1))
