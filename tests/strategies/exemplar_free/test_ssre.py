import math
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet, plain_net, run

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.ssre import _CLASSES, SSRE, similarity_to_old
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

ADAM = partial(torch.optim.Adam, lr=1e-3)

# Small steps: logits are multiplied by ten.
SUBJECTS = {
    "SSRE": Subject(small(SSRE, optimizer=ADAM), first_task_is_finetuning=False, reason="logits are divided by tau"),
}

PUBLISHED = {
    "ssre_cifar100": {
        "source": "LAMDA-CL/PyCIL: exps/ssre.json",
        "backbone": "ResNet18",
        "prototype_weight": 10.0,
        "distill_weight": 2.0,
        "temperature": 0.1,
        "optimizer": "Adam(lr=0.001, weight_decay=0.0002)",
        "scheduler": "StepLR(gamma=0.1, step_size=45)",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 64,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "trainer.max_epochs": 101,
    },
}


def test_the_similarity_is_the_largest_cosine():
    features = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    prototypes = torch.tensor([[5.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    expected = [7 / (5 * math.sqrt(2)), 0.0, 1 / math.sqrt(2)]  # .6 and .99; -1 and -.71; 0 and .71
    torch.testing.assert_close(similarity_to_old(features, prototypes), torch.tensor(expected, dtype=torch.float64))


def test_similarities_have_no_gradient_and_are_1_at_a_prototype():
    prototypes = normal(3, 4)
    w = similarity_to_old((2 * prototypes).requires_grad_(), prototypes)
    assert not w.requires_grad
    assert (w <= 1).all()
    torch.testing.assert_close(w, torch.ones(3, dtype=torch.float64))


def test_terms_are_their_definition():
    seen = []

    class Look(SSRE):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            log_p = (output.logits / 0.3).log_softmax(1)
            ce = -torch.stack([log_p[i, y] for i, y in enumerate(batch.labels.tolist())])
            seen.append(self.task.index)
            if self.task.is_first:
                torch.testing.assert_close(terms, {"ce": ce.mean()})
                return terms
            earlier = self.task.num_seen - self.task.num_new
            means = self.prototypes.means
            w = torch.stack(
                [max(torch.cosine_similarity(f, means[c], dim=0) for c in range(earlier)) for f in output.features]
            ).detach()
            assert 0 < w.min() < w.max() < 1
            gaps = [(f - g).norm() for f, g in zip(output.features, self.teacher(batch.images).features, strict=True)]
            old = batch.draw.fork(_CLASSES).randint(earlier)
            log_old = (self.network.head(means[old]) / 0.3).log_softmax(1)
            expected = {
                "ce": sum((1 - w) * ce) / len(batch),
                "distill": 7 * sum(a * b for a, b in zip(w, gaps, strict=True)),
                "prototypes": -4 * sum(log_old[j, c] for j, c in enumerate(old.tolist())) / len(batch),
            }
            torch.testing.assert_close(terms, expected)
            return terms

    options = {"prototype_weight": 4.0, "distill_weight": 7.0, "temperature": 0.3}
    run(Look(backbone=plain_net, optimizer=ADAM, **options), max_epochs=1)
    assert set(seen) == {0, 1, 2}


def test_after_the_first_task_adapters_and_head_alone_are_trained_until_they_are_folded():
    kept = {}

    class Look(SSRE):
        def on_train_start(self):
            base, peft = self.network.backbone.base, self.network.backbone.peft
            kept["start"] = {name: value.clone() for name, value in base.state_dict().items()}
            assert all(not value.any() for value in peft.parameters())
            assert any(p.requires_grad for p in base.parameters()) == self.task.is_first
            assert all(p.requires_grad != self.task.is_first for p in peft.parameters())

        def end_task(self, task):
            base, peft = self.network.backbone.base, self.network.backbone.peft
            same = {name: torch.equal(value, kept["start"][name]) for name, value in base.state_dict().items()}
            assert all(same.values()) != task.is_first  # running statistics included
            images = torch.rand(6, 1, 8, 8)
            before = self.network(images).logits
            assert any(value.any() for value in peft.parameters()) != task.is_first
            super().end_task(task)
            torch.testing.assert_close(self.network(images).logits, before, rtol=1e-5, atol=1e-5)
            if not task.is_first:
                assert not torch.equal(base.layers[1].weight, kept["start"]["layers.1.weight"])
                assert torch.equal(self.prototypes.means[: len(kept["means"])], kept["means"])
            kept["means"] = self.prototypes.means.clone()

    run(Look(backbone=NormNet, optimizer=ADAM), max_epochs=2)


def test_it_forgets_far_less_than_fine_tuning():
    options = {"data": {"scenario": ClassIncremental(sizes=[6, 2, 2]), "batch_size": 32}, "max_epochs": 6}
    common = {"backbone": partial(MLP, hidden=(64,)), "optimizer": ADAM}
    plain, ours = (last_accuracy(run(cls(**common), **options).matrix.R_ci) for cls in (Finetune, SSRE))
    # Measured: .80 against .31.
    assert ours > plain + 0.25


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"prototype_weight": -1.0}, {"distill_weight": -2.0}])
def test_options_out_of_range_are_errors(options: dict):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"SSRE: {name} is {value}"):
        SSRE(**options)
