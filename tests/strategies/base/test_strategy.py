"""The base of all strategies, through fine-tuning."""

import itertools
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from support.baselines import finetuning
from support.fakes import batch_of
from support.runs import NormNet, loop, plain_net, run, sgd
from support.watching import watching
from torch import nn

from cl_lightning import testing
from cl_lightning.memory import PrototypeHead
from cl_lightning.models import MLP, Output
from cl_lightning.strategies.base.schedules import StepsOverPhase
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.baselines.joint import Joint
from cl_lightning.strategy import ContinualStrategy, Phase, PhaseOptions
from cl_lightning.stream import Blurry, ClassIncremental
from cl_lightning.testing import Subject, TinyDigits

FINETUNE = partial(Finetune, backbone=plain_net, optimizer=sgd)


def test_with_current_logits_old_rows_get_no_gradient_and_do_not_move():
    made = loop(FINETUNE(loss_classes="current"), options={"stop_after_task": 0})
    made.fit()
    block = made.strategy.network.head.blocks[0]
    before = {name: value.clone() for name, value in block.state_dict().items()}
    made.options = type(made.options)()
    made._run_task(made.stream.tasks[1], None)
    after = made.strategy.network.head.blocks[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # in spite of momentum and weight decay
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_with_all_logits_old_classes_are_forgotten_at_once():
    made = run(FINETUNE(), max_epochs=4)
    final = made.matrix.R_ci[2]
    assert final[0] < 0.1
    assert final[2] > 0.5


def test_with_task_logits_the_task_aware_reading_stays_high():
    made = run(FINETUNE(loss_classes="task"), max_epochs=4)
    assert made.matrix.R_ti[2, :3].min() > 0.6
    assert made.matrix.R_ti[2, 0] > made.matrix.R_ci[2, 0]


def test_each_visible_mode_masks_its_columns():
    made = loop(FINETUNE(loss_classes="task"), options={"stop_after_task": 1})
    made.fit()
    strategy = made.strategy
    logits = torch.randn(4, 7, requires_grad=True)
    batch = batch_of(torch.tensor([0, 3, 4, 6]), tasks=torch.tensor([0, 0, 1, 1]))
    output = Output(logits, logits)
    for visible, expected in (
        ("task", [[1, 1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 0, 1, 1, 1]] * 2),
        ("all", [[1] * 7] * 4),
    ):
        strategy.loss_classes = visible
        logits.grad = None
        strategy.classification_loss(output, batch).backward()
        assert torch.equal((logits.grad != 0).int(), torch.tensor(expected, dtype=torch.int32))


def test_a_frozen_backbone_does_not_move_and_stays_in_eval_mode():
    def modes(strategy, *_):
        return strategy.network.backbone.training, strategy.network.head.training

    made = loop(watching(Finetune, modes, backbone=plain_net, freeze_backbone=True))
    made._prepare(None)
    before = {name: value.clone() for name, value in made.strategy.network.backbone.state_dict().items()}
    made.fit()
    after = made.strategy.network.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {mode for steps in made.strategy.recorded.values() for mode in steps} == {(False, True)}


class Normed(Callback):
    """Notes the normalisation of the backbone, and a weight of it that is none, as each fit ends."""

    def __init__(self, made):
        self.made, self.noted = made, []
        self.note()

    def note(self):
        state = self.made.strategy.network.backbone.state_dict()
        weight = state.pop("layers.1.weight").clone()
        self.noted.append(({name: value.clone() for name, value in state.items() if ".2." in name}, weight))

    def on_train_end(self, trainer, strategy):
        self.note()


@pytest.mark.parametrize(("freeze_norm", "moves"), [("never", 3), ("after_first", 1), ("always", 0)])
def test_normalisation_stays_as_it_is_where_it_is_frozen(freeze_norm, moves):
    made = loop(Finetune(backbone=NormNet, optimizer=sgd, freeze_norm=freeze_norm), max_epochs=1)
    made._prepare(None)
    made.trainer.callbacks.append(normed := Normed(made))
    made.fit()
    assert len(normed.noted) == 4
    pairs = itertools.pairwise(normed.noted)
    moved = []
    for (before, weight), (after, new_weight) in pairs:
        assert len(before) == 5  # gamma, beta, mean, variance, count
        assert not torch.equal(weight, new_weight)
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
    assert moved == [set(before)] * moves + [set()] * (3 - moves)


def test_norms_can_only_be_frozen_where_there_are_any():
    with pytest.raises(ValueError, match="freeze_norm is 'allways'; use 'never', 'after_first' or 'always'"):
        Finetune(freeze_norm="allways")
    with pytest.raises(ValueError, match=r"freeze_norm is 'always', .* has no batch normalisation"):
        loop(Finetune(backbone=plain_net, freeze_norm="always")).fit()


def test_the_first_task_can_have_its_own_optimizer_epochs_and_schedule():
    seen = []

    class Watching(Finetune):
        def configure_optimizers(self):
            configured = super().configure_optimizers()
            optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
            scheduled = isinstance(configured, dict)
            seen.append(
                (type(optimizer).__name__, optimizer.param_groups[0]["lr"], scheduled, self.phase.options.epochs)
            )
            return configured

    strategy = Watching(
        backbone=plain_net,
        optimizer=partial(torch.optim.Adam, lr=0.001),
        first_optimizer=partial(torch.optim.SGD, lr=0.1),
        first_scheduler=partial(StepsOverPhase, at=[0.5]),
    )
    made = run(strategy, options={"first_task_epochs": 3}, max_epochs=1)
    assert seen[-3:] == [("SGD", 0.1, True, 3), ("Adam", 0.001, False, 1), ("Adam", 0.001, False, 1)]  # after a dry run
    assert made.trainer.current_epoch == 5


def test_phases_are_fits_of_their_own_with_the_parameters_they_choose():
    log = []

    class TwoPhases(Finetune):
        def phases(self, task):
            return [Phase("body"), Phase("head", PhaseOptions(epochs=3, optimizer=partial(torch.optim.SGD, lr=0.5)))]

        def trainable(self):
            return self.network.head.parameters() if self.phase.name == "head" else super().trainable()

        def on_train_start(self):
            self.body = [value.clone() for value in self.network.backbone.parameters()]

        def end_phase(self, phase):
            moved = any(
                not torch.equal(a, b) for a, b in zip(self.body, self.network.backbone.parameters(), strict=True)
            )
            log.append((self.task.index, phase.name, moved, self.phase.options.epochs))

    run(TwoPhases(backbone=plain_net), options={"phase_epochs": {"body": 1}}, max_epochs=2)
    expected = [("body", True, 1), ("head", False, 3)]
    assert log == [(task, *phase) for task in range(3) for phase in expected]


def test_a_task_may_have_no_gradient_step():
    class Means(ContinualStrategy):
        def phases(self, task):
            return []

    made = run(Means(backbone=partial(MLP, hidden=()), head=PrototypeHead))
    assert made.trainer.global_step == 0
    assert made.matrix.measures()["average_accuracy"] > 0.8  # class means of pixels
    first, last = made.matrix.R_ci[0, 0], made.matrix.R_ci[2, 0]
    assert last > first - 0.15


def test_the_nearest_class_mean_does_not_depend_on_how_the_stream_is_cut():
    class Means(ContinualStrategy):
        def phases(self, task):
            return []

    finals = []
    for sizes in ([10], [5, 5], [1] * 10):
        data = {"scenario": ClassIncremental(sizes=sizes)}
        made = run(Means(backbone=partial(MLP, hidden=()), head=PrototypeHead), data=data)
        finals.append(made.matrix.measures()["average_accuracy"])
    assert finals[0] == finals[1] == finals[2]


def test_joint_training_forgets_nothing_and_beats_finetuning():
    joint = run(Joint(backbone=plain_net), max_epochs=4)
    finetune = finetuning({"backbone": plain_net}, max_epochs=4)
    # Measured: .95 against .25, and a forgetting of .02.
    assert joint.matrix.measures()["average_accuracy"] > finetune.measures()["average_accuracy"] + 0.35
    assert joint.matrix.measures()["forgetting"] < 0.25


def test_joint_from_scratch_has_new_weights_at_each_task():
    weights = []

    class Watching(Joint):
        def begin_task(self, task):
            super().begin_task(task)
            weights.append(self.network.backbone.layers[1].weight.detach().clone())

    run(Watching(backbone=plain_net, from_scratch=True), max_epochs=1)
    assert len(weights) == 3
    bound = 1 / 64**0.5 + 1e-6  # of a fresh nn.Linear of 64 inputs
    assert all(weight.abs().max() <= bound for weight in weights)
    assert not torch.equal(weights[1], weights[2])


def test_without_parameters_to_train_the_phase_is_named():
    class Nothing(Finetune):
        def trainable(self):
            return []

    with pytest.raises(ValueError, match="phase 'train' of task 0 has no parameters to train"):
        run(Nothing(backbone=plain_net))


def test_two_terms_of_one_name_are_refused():
    from cl_lightning.callback import ContinualCallback

    class Doubled(ContinualCallback):
        def losses(self, strategy, batch, output):
            return {"ce": output.logits.sum()}

    with pytest.raises(ValueError, match="Doubled: the loss term 'ce' exists already"):
        run(FINETUNE(), Doubled())


def test_a_step_of_one_image_that_batch_normalisation_cannot_take_is_reported():
    subject = Subject(partial(Finetune, backbone=NormNet))  # the last batch of the first task has one image
    with pytest.raises(ValueError, match=r"task '.+': a step has one image.*drop_last true"):
        testing.run(subject)
    testing.run(Subject(subject.factory, data=partial(TinyDigits, drop_last=True)))


def test_an_unknown_visible_mode_and_joint_with_current_are_refused():
    with pytest.raises(ValueError, match="loss_classes is 'none'"):
        Finetune(loss_classes="none")
    with pytest.raises(ValueError, match="Joint: loss_classes is 'current'"):
        Joint(loss_classes="current")


def test_the_network_is_built_for_the_shape_of_the_images():
    made = loop(Finetune(backbone=lambda shape: MLP(shape, hidden=(5,))))
    made._prepare(None)
    assert made.strategy.image_shape == (1, 8, 8)
    assert isinstance(made.strategy.network.backbone.layers[1], nn.Linear)


def test_gradients_are_edited_once_per_step_after_they_are_accumulated_and_before_they_are_clipped():
    class Edits(Finetune):
        edited, last = 0, None

        def edit_gradients(self, batch):
            self.edited, self.last = self.edited + 1, batch
            for parameter in self.parameters():
                parameter.grad.fill_(1000.0)

        def after_step(self, batch):
            assert self.last is None or batch is self.last
            self.last = None

    slow = partial(torch.optim.SGD, lr=1.0)
    made = loop(
        Edits(backbone=plain_net, optimizer=slow),
        options={"stop_after_task": 0},
        accumulate_grad_batches=2,
        gradient_clip_val=0.01,
        max_epochs=1,
    )
    made._prepare(None)
    before = [parameter.clone() for parameter in made.strategy.network.backbone.parameters()]
    made.fit()
    steps = made.trainer.global_step
    assert made.strategy.edited == steps == -(-len(made.stream.train[0]) // 128)
    size = sum(parameter.numel() for parameter in made.strategy.parameters())
    for old, new in zip(before, made.strategy.network.backbone.parameters(), strict=True):
        torch.testing.assert_close(old - new, torch.full_like(old, steps * 0.01 / size**0.5), rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("scenario", [Blurry(3, 50, 30), ClassIncremental(tasks=5)])
def test_rows_that_the_loss_of_current_classes_reaches_are_trained_and_no_others(scenario):
    """Also those of earlier classes that come again."""
    seen = []

    class Look(Finetune):
        def on_train_end(self):
            super().on_train_end()
            of_task = torch.split(self.task_columns[-1], self.network.head.block_sizes())
            trained = [bool(block.weight.requires_grad) for block in self.network.head.blocks]
            seen.append((trained, [bool(columns.any()) for columns in of_task]))

    run(Look(loss_classes="current"), data={"scenario": scenario}, max_epochs=1)
    assert len(seen) > 2
    assert all(trained == reached for trained, reached in seen)
    again = [sum(reached) > 1 for _, reached in seen]
    assert any(again) == isinstance(scenario, Blurry)


def test_the_range_of_pixels_is_that_of_finished_images():
    strategy = run(Finetune(), max_epochs=1, limit_train_batches=1, data={"mean": [0.25], "std": [0.5]}).strategy
    low, high = strategy.data.pixel_range(torch.zeros(0, 1, 8, 8, dtype=torch.uint8))
    torch.testing.assert_close(low, torch.full((1, 8, 8), -0.5))
    torch.testing.assert_close(high, torch.full((1, 8, 8), 1.5))
