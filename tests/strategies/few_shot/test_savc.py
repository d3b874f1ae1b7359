"""Virtual classes and virtual contrast."""

import math
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.few_shot import OPTIONS, sessions
from support.runs import assert_same_run
from torch.nn import functional as F

from cl_lightning.loop.results import measures
from cl_lightning.memory import Teacher
from cl_lightning.models import MLP
from cl_lightning.strategies.few_shot.proto_cosine import ProtoCosine
from cl_lightning.strategies.few_shot.savc import SAVC, KeyQueue, virtual_contrast
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "SAVC": Subject(
        small(SAVC, queue_size=40, projection_size=8, local_crops=2),
        first_task_is_finetuning=False,
        reason="virtual classes are trained, and class means take the place of the head",
    ),
}

PUBLISHED = {
    "savc": {
        "source": "zysong0113/SAVC: the command for CIFAR-100, apart from the size of small crops, 18",
        "copies": "rotation2",
        "global_weight": 0.2,
        "local_weight": 0.8,
        "momentum": 0.995,
        "queue_size": 8192,
        "temperature": 0.07,
        "projection_size": 32,
        "global_scale": [0.9, 1.0],
        "local_scale": [0.2, 0.7],
        "local_crops": 4,
        "local_size": None,
        "scale": 16.0,
        "optimizer": "SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
    },
}


def test_each_positive_is_compared_with_the_negatives_alone():
    q, own, keys = (F.normalize(normal(n, 6, seed=n), dim=1) for n in (4, 4, 7))
    own = own.flip(0)
    labels, of_keys = torch.tensor([1, 0, 9, -1]), torch.tensor([0, 1, 1, -1, 3, 0, 1])
    found = virtual_contrast(q, own, labels, keys, of_keys, 0.3)
    for i, loss in enumerate(found):
        mine = [keys[j] for j in range(7) if of_keys[j] == labels[i] and of_keys[j] >= 0] + [own[i]]
        rest = [keys[j] for j in range(7) if of_keys[j] != labels[i] and of_keys[j] >= 0]
        assert len(mine) == [4, 3, 1, 1][i]
        terms = [math.log(1 + sum(math.exp(float(q[i] @ n - q[i] @ p) / 0.3) for n in rest)) for p in mine]
        assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    assert (found > 0).all()
    # With a single positive it is InfoNCE.
    logits = torch.cat([(q[2] * own[2]).sum().view(1), keys[of_keys >= 0] @ q[2]]) / 0.3
    assert float(found[2]) == pytest.approx(float(F.cross_entropy(logits[None], torch.tensor([0]))))


def test_without_negatives_loss_and_gradient_are_0():
    q = normal(2, 3).requires_grad_()
    for labels in ([-1, -1], [4, -1]):
        loss = virtual_contrast(q, q.detach(), torch.tensor([4, 4]), normal(2, 3), torch.tensor(labels), 0.07)
        assert loss.tolist() == [0.0, 0.0]
        (gradient,) = torch.autograd.grad(loss.sum(), q)
        assert torch.equal(gradient, torch.zeros_like(q))


def test_a_queue_replaces_its_oldest_keys():
    queue = KeyQueue(3, 2, 5)
    assert queue.labels.tolist() == [-1] * 5
    keys = torch.arange(22.0).view(11, 2)
    queue.push(keys[:3], torch.tensor([0, 1, 2]))
    assert queue.labels.tolist() == [0, 1, 2, -1, -1]
    queue.push(keys[3:7], torch.tensor([3, 4, 5, 6]))
    assert queue.labels.tolist() == [5, 6, 2, 3, 4]
    torch.testing.assert_close(queue.keys, keys[queue.labels])
    queue.push(keys[7:7], torch.zeros(0, dtype=torch.int64))
    queue.push(keys[4:], torch.arange(4, 11))  # more than its length
    assert sorted(queue.labels.tolist()) == [6, 7, 8, 9, 10]
    torch.testing.assert_close(queue.keys, keys[queue.labels])


class Watched(SAVC):
    """Computes the terms of each step again, and what a step changes."""

    checked = 0

    def losses(self, batch, output):
        queue = self.keys
        seen, calls = [], []
        self._keys, self._contrast = self._noted(SAVC._keys, seen), self._noted(SAVC._contrast, calls)
        terms = super().losses(batch, output)
        del self._keys, self._contrast
        n, rows = len(batch) // 2, self.network.head.temporary.weight().view(-1, 64)
        labels = torch.cat([2 * batch.labels[:n], 2 * batch.labels[:n] + 1])
        assert torch.equal(batch.images[n:], batch.images[:n].flip(2, 3))
        cosines = F.cosine_similarity(output.features[:, None], rows[None], dim=2)
        torch.testing.assert_close(terms["ce"], F.cross_entropy(16 * cosines, labels))
        ((images, _, _),), ((keys,),) = calls[:1], seen
        teacher = self.key_encoder.network.backbone(keys)
        own = F.normalize(queue.key_projection(teacher), dim=1)
        for (images, given, of), name, weight in zip(calls, ("global", "local"), (0.2, 0.8), strict=True):
            times = len(images) // (2 * n)
            assert times == {"global": 1, "local": 3}[name]
            torch.testing.assert_close(given, own.repeat(times, 1))
            assert torch.equal(of, labels.repeat(times))
            assert torch.equal(images[n : 2 * n], images[:n].flip(2, 3))
            assert not torch.equal(images[: 2 * n], keys)
            q = F.normalize(queue.projection(self.network.backbone(images)), dim=1)
            each = virtual_contrast(q, given, of, queue.keys, queue.labels, 0.07)
            torch.testing.assert_close(terms[name], weight * each.mean())
        self.expected = torch.stack([own[m * n + i] for i in range(n) for m in range(2)]).detach()
        self.before = [p.clone() for p in self.moving()[0]], queue.place.clone()
        return terms

    def moving(self):
        slow = [*self.key_encoder.network.backbone.parameters(), *self.keys.key_projection.parameters()]
        return slow, [*self.network.backbone.parameters(), *self.keys.projection.parameters()]

    def _noted(self, method, calls):
        def call(*arguments):
            calls.append(arguments)
            return method(self, *arguments)

        return call

    def after_step(self, batch):
        super().after_step(batch)
        old, place = self.before
        for mine, now, other in zip(old, *self.moving(), strict=True):
            torch.testing.assert_close(now, 0.9 * mine + 0.1 * other)
        places = (place + torch.arange(len(self.expected))) % 300
        torch.testing.assert_close(self.keys.keys[places], self.expected)
        assert torch.equal(self.keys.labels[places][::2], 2 * batch.labels)
        assert torch.equal(self.keys.labels[places][1::2], 2 * batch.labels + 1)
        self.checked += 1


def test_the_terms_of_a_step_and_what_it_changes():
    made = sessions(
        Watched(**OPTIONS, momentum=0.9, queue_size=300, local_crops=3, transforms=[]), until=0, max_epochs=1
    )
    assert made.strategy.checked == made.trainer.global_step > 0
    assert not made.strategy.queue
    assert not made.strategy.key_encoder
    assert isinstance(made.strategy.key_encoder, Teacher)


def test_small_crops_are_of_the_crop_of_the_key():
    seen = []

    class Notes(SAVC):
        def _copied(self, batch, crops, salt):
            seen.append(crops)
            return super()._copied(batch, crops, salt)

    net = partial(MLP, hidden=(8,))
    flat = Notes(backbone=net, global_scale=(0.25, 0.25), local_scale=(0.04, 0.04), local_crops=1, transforms=[])
    sessions(flat, until=0, max_epochs=1, limit_train_batches=3)
    inside, others = 0, 0
    for place in range(0, len(seen), 3):
        for key, query, part in zip(*(crops.flatten(1).float() for crops in seen[place : place + 3]), strict=True):
            inside += bool(part.max() <= key.max() + 1 and part.min() >= key.min() - 1)
            others += bool(part.max() <= query.max() + 1 and part.min() >= query.min() - 1)
    assert inside > 1.05 * others


def test_with_one_transform_and_without_contrast_it_is_proto_cosine():
    mine = SAVC(**OPTIONS, copies="none", global_weight=0.0, local_weight=0.0)
    assert_same_run(*(sessions(each, max_epochs=2) for each in (ProtoCosine(**OPTIONS), mine)))


def test_predictions_average_over_transforms():
    made = sessions(SAVC(**OPTIONS, copies="rotation4", global_weight=0.0, local_weight=0.0), max_epochs=1)
    strategy = made.strategy.eval()
    with torch.no_grad():
        batch = next(strategy.passes.batches())  # of the last session
        images, f = batch.images, strategy.network.backbone
        scores = strategy.predict(images)
        for c in (8, 9):
            turned = [images.rot90(m, (2, 3)) for m in range(4)]
            means = [f(t)[batch.labels == c].mean(0) for t in turned]
            expected = sum(F.cosine_similarity(f(t), mean, dim=1) for t, mean in zip(turned, means, strict=True)) / 4
            torch.testing.assert_close(scores[:, c], expected, rtol=1e-4, atol=1e-5)


def test_sessions_are_learnt_better_than_by_class_means():
    options = {"transforms": [], "copies": "rotation2", "queue_size": 1024, "local_scale": (0.5, 0.9), "local_crops": 2}
    made, plain = sessions(SAVC(**OPTIONS, **options)), sessions(ProtoCosine(**OPTIONS))
    found = measures(made.matrix, made.stream, 2)["harmonic_accuracy"]
    # Measured: a harmonic mean of .88, of class means without virtual classes and contrast .73.
    assert found > measures(plain.matrix, plain.stream, 2)["harmonic_accuracy"] + 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": "mirror"}, "SAVC: copies is 'mirror'; use 'none'"),
        ({"global_weight": -0.1}, "SAVC: global_weight is -0.1"),
        ({"local_weight": -0.1}, "SAVC: local_weight is -0.1"),
        ({"momentum": 1.5}, "SAVC: momentum is 1.5"),
        ({"queue_size": 0}, "SAVC: queue_size is 0"),
        ({"temperature": 0.0}, "SAVC: temperature is 0.0"),
        ({"local_size": 0}, "SAVC: local_size is 0"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SAVC(**options)


@pytest.mark.parametrize(("copies", "shape"), [("rotation_color12", (1, 8, 8)), ("rotation2", (1, 8, 9))])
def test_images_without_such_copies_are_an_error(copies, shape):
    with pytest.raises(ValueError, match=f"SAVC: copies is '{copies}', but"):
        SAVC(copies=copies).build(shape)
