import copy
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import NormNet, assert_same, assert_same_run, loop, plain_net, run, sgd
from support.teaching import losses
from torch.nn import functional as F

from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategy import Phase
from cl_lightning.stream import RotatedDomains
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "LwF": Subject(small(LwF)),
    "LwF(form=sigmoid)": Subject(
        small(LwF, form="sigmoid"),
        first_task_is_finetuning=False,
        reason="binary cross-entropy takes the place of cross-entropy",
    ),
}

PUBLISHED = {
    "pred_kd_cifar100": {
        "source": "Smith et al. 2023, implementation details for CIFAR-100 from scratch",
        "form": "sigmoid",
        "backbone": "ResNet18",
        "optimizer": "Adam(lr=0.001, weight_decay=0.0002)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[100, 150, 200])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "trainer.max_epochs": 250,
    },
}

LWF = partial(LwF, backbone=plain_net, optimizer=sgd)


@pytest.mark.parametrize(("scaled", "factor"), [(False, 0.7), (True, 0.7 * 9)])
def test_the_terms_are_cross_entropy_and_softened_distillation(scaled, factor):
    logits, taught, labels = normal(4, 5), normal(4, 3, seed=1), torch.tensor([0, 3, 4, 2])
    strategy = LwF(distill_weight=0.7, temperature=3.0, scale_by_temperature=scaled, loss_classes="all")
    strategy.phase = Phase()
    found = losses(strategy, logits, labels, taught)
    torch.testing.assert_close(found["ce"], F.cross_entropy(logits, labels))
    distill = -((taught / 3).softmax(1) * (logits[:, :3] / 3).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found["distill"], factor * distill)


def test_the_sigmoid_form_is_binary_cross_entropy_to_the_teacher_and_the_labels():
    logits, taught, labels = normal(3, 4), normal(3, 2, seed=1), torch.tensor([2, 3, 0])
    found = losses(LwF(form="sigmoid", loss_classes="all"), logits, labels, taught)
    targets = torch.cat([taught.sigmoid(), F.one_hot(labels, 4)[:, 2:].double()], 1)
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    torch.testing.assert_close(found, {"bce": expected})


def test_with_weight_0_it_is_finetuning_on_the_new_rows_to_the_bit():
    assert_same_run(
        run(LWF(distill_weight=0.0)), run(Finetune(backbone=plain_net, optimizer=sgd, loss_classes="current"))
    )


def test_one_task_is_finetuning():
    options = {"stop_after_task": 0}
    lwf, finetune = run(LWF(), options=options), run(Finetune(backbone=plain_net, optimizer=sgd), options=options)
    assert_same_run(lwf, finetune)


def test_the_distillation_has_no_gradient_before_the_first_step_of_a_task():
    made = loop(LWF(), options={"stop_after_task": 0})
    made.fit()
    strategy = made.strategy
    strategy.network.head.grow(3)
    images = torch.rand(5, 1, 8, 8)
    output = strategy.network(images)
    batch = batch_of(torch.tensor([4, 5, 6, 4, 5]), images=images, tasks=torch.ones(5).long())
    strategy.task_columns = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]]).bool()
    term = strategy.losses(batch, output)["distill"]
    gradients = torch.autograd.grad(term, [strategy.network.head.blocks[0].weight])
    assert gradients[0].abs().max() < 1e-7  # softmax of equal logits
    entropy = -(F.softmax(output.logits[:, :4] / 2, 1) * F.log_softmax(output.logits[:, :4] / 2, 1)).sum(1).mean()
    torch.testing.assert_close(term, entropy)


def test_the_teacher_is_the_network_at_the_end_of_the_last_task_and_never_changes():
    kept = []

    class Watching(LwF):
        def on_train_start(self):
            kept.append({name: value.clone() for name, value in self.teacher.state_dict().items()})

        def on_train_end(self):
            assert_same(kept[-1], dict(self.teacher.state_dict()))

    made = run(Watching(backbone=plain_net))
    assert kept[0] == {}
    assert made.strategy.teacher.num_columns == 10
    assert_same(made.strategy.teacher.network.state_dict(), made.strategy.network.state_dict())


def test_it_keeps_old_tasks_better_than_finetuning_where_the_task_is_known():
    lwf = run(LwF(backbone=plain_net, distill_weight=5.0), max_epochs=6)
    finetune = finetuning({"backbone": plain_net}, max_epochs=6)
    # Measured: .99 against .44.
    assert lwf.matrix.R_ti[2, 0] > finetune.R_ti[2, 0] + 0.25


def test_the_sigmoid_form_keeps_old_classes_in_class_incremental_streams():
    lwf = run(LwF(backbone=plain_net, form="sigmoid"), max_epochs=6)
    finetune = finetuning({"backbone": plain_net}, max_epochs=6)
    assert lwf.matrix.measures()["average_accuracy"] > finetune.measures()["average_accuracy"] + 0.05


def test_the_warm_up_trains_the_new_rows_alone():
    moved = []

    class Watching(LwF):
        def on_train_start(self):
            self.before = {name: value.clone() for name, value in self.network.named_parameters()}

        def end_phase(self, phase):
            changed = {n for n, v in self.network.named_parameters() if not torch.equal(v, self.before[n])}
            moved.append((self.task.index, phase.name, changed))

    run(Watching(backbone=plain_net, optimizer=sgd, warmup_epochs=1), options={"stop_after_task": 1})
    assert [entry[:2] for entry in moved] == [(0, "train"), (1, "warmup"), (1, "train")]
    assert moved[1][2] == {"head.blocks.1.weight", "head.blocks.1.bias"}
    assert len(moved[2][2]) > 2


def test_the_warm_up_leaves_statistics_of_normalisation_dropout_and_the_teacher_alone():
    log = []

    class Watching(LwF):
        def on_train_start(self):
            self.asked, self.before = 0, copy.deepcopy(self.network.backbone.state_dict())

        def losses(self, batch, output):
            modes = {module.training for module in self.network.backbone.modules()}
            assert modes == {self.phase.name == "train"}
            return super().losses(batch, output)

        def end_phase(self, phase):
            now = self.network.backbone.state_dict()
            moved = [name for name, value in now.items() if not torch.equal(value, self.before[name])]
            assert len(moved) in (0, len(now))
            log.append((self.task.index, phase.name, bool(moved), self.asked > 0))

    strategy = Watching(backbone=NormNet, optimizer=sgd, warmup_epochs=1)

    def count(*_):
        strategy.asked += 1

    strategy.teacher.register_forward_hook(count)
    run(strategy, max_epochs=1)
    later = [entry for task in (1, 2) for entry in ((task, "warmup", False, False), (task, "train", True, True))]
    assert log == [(0, "train", True, False), *later]


def test_tasks_without_new_classes_have_no_warm_up():
    names = []

    class Watching(LwF):
        def end_phase(self, phase):
            names.append(phase.name)

    run(Watching(backbone=plain_net, warmup_epochs=1), data={"scenario": RotatedDomains(tasks=2)}, max_epochs=1)
    assert names == ["train", "train"]


@pytest.mark.parametrize("options", [{"distill_weight": -1.0}, {"temperature": 0.0}, {"form": "hinge"}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="LwF"):
        LwF(**options)
