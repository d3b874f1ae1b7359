from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fakes import task_of
from support.runs import NormNet, assert_resumes, assert_same, assert_same_run, loop, plain_net, run, sgd

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.importance_penalty import ImportancePenalty
from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, LinearHead, Network
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.ewc import EWC
from cl_lightning.stream import PermutedDomains

PUBLISHED = {
    "finetune_mas": {
        "source": "Aljundi et al., ECCV 2018: lambda 1 of a penalty without the factor 1/2",
        "trainer.gradient_clip_val": 1.0,
        "trainer.callbacks": ["ImportancePenalty(estimator=mas, weight=2.0)"],
    },
}


def finetune(**options):
    return Finetune(**{"backbone": NormNet, "optimizer": sgd, **options})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"on": "backbone", "labels": "empirical", "per_sample": False}, {}),
        ({"merge": "decay", "decay": 0.5}, {"online": True, "decay": 0.5}),
    ],
    ids=["ewc", "backbone", "online"],
)
def test_finetune_with_the_fisher_penalty_is_ewc_to_the_bit(ours, theirs):
    shared = {key: value for key, value in ours.items() if key not in ("merge", "decay")}
    callback = ImportancePenalty(weight=100.0, **ours)
    ewc = run(EWC(backbone=NormNet, optimizer=sgd, penalty_weight=100.0, **shared, **theirs))
    assert_same_run(run(finetune(), callback), ewc)
    assert_same(callback.state_dict(), dict(ewc.strategy.consolidation.state_dict()))
    assert callback.bytes_kept() == {"importance": ewc.strategy.bytes_kept()["importance"]}


@pytest.mark.parametrize("loss_classes", ["all", "current"])
@pytest.mark.parametrize("estimator", ["fisher", "mas", "si", "rwalk", "l2"])
def test_weight_0_is_finetuning_to_the_bit(estimator, loss_classes):
    callback = ImportancePenalty(estimator=estimator, weight=0.0)
    assert_same_run(run(finetune(loss_classes=loss_classes), callback), run(finetune(loss_classes=loss_classes)))


@pytest.mark.parametrize(
    ("estimator", "weight"),
    [("fisher", 100.0), ("mas", 0.01), ("si", 1.0), ("rwalk", 10.0), ("l2", 0.1)],
    ids=lambda value: str(value),
)
def test_a_penalty_holds_weights_and_resumes_to_the_bit(estimator, weight, tmp_path):
    assert_resumes(lambda: (finetune(), [ImportancePenalty(estimator=estimator, weight=weight)]), tmp_path)

    def moved(*callbacks):
        start = {}

        class Remember(ContinualCallback):
            def on_task_start(self, trainer, strategy, task):
                start.update({name: p.detach().clone() for name, p in strategy.network.backbone.named_parameters()})

        end = dict(run(finetune(), Remember(), *callbacks).strategy.network.backbone.named_parameters())
        return sum(float((end[name].detach() - value).square().sum()) for name, value in start.items())

    assert moved(ImportancePenalty(estimator=estimator, weight=weight)) < 0.95 * moved()


@pytest.mark.parametrize("clamp", [True, False])
def test_importances_of_the_path_match_its_definition(clamp):
    c, xi = 0.1, 0.01
    callback = ImportancePenalty(estimator="si", weight=c, xi=xi, clamp=clamp)

    class Plain(ContinualCallback):
        """omega_j = sum over tasks of relu(w_j) / ((theta_j - start_j)^2 + xi), in float64; relu with ``clamp``."""

        def __init__(self):
            self.omega, self.anchor = {}, {}

        def parameters(self, strategy):
            return {name: p.detach().double().clone() for name, p in strategy.network.named_parameters()}

        def on_task_start(self, trainer, strategy, task):
            self.start = self.parameters(strategy)
            self.work = {name: torch.zeros_like(value) for name, value in self.start.items()}

        def on_before_optimizer_step(self, trainer, strategy, optimizer):
            self.before = self.parameters(strategy)
            self.gradient = {}
            for name, p in strategy.network.named_parameters():
                self.gradient[name] = p.grad.double().clone()
                if name in self.omega:
                    self.gradient[name] -= 2 * c * self.omega[name] * (self.before[name] - self.anchor[name])

        def on_train_batch_end(self, trainer, strategy, outputs, batch, batch_idx):
            if (batch_idx + 1) % 2 and batch_idx + 1 != trainer.num_training_batches:
                return  # gradients are being accumulated
            for name, value in self.parameters(strategy).items():
                self.work[name] -= self.gradient[name] * (value - self.before[name])

        def on_task_end(self, trainer, strategy, task):
            self.anchor = self.parameters(strategy)
            for name, value in self.anchor.items():
                work = self.work[name].clamp(min=0) if clamp else self.work[name]
                new = work / ((value - self.start[name]).square() + xi)
                self.omega[name] = self.omega.get(name, 0) + new

    plain = Plain()
    run(finetune(), plain, callback, accumulate_grad_batches=2, gradient_clip_val=0.5)
    omegas, anchors = callback.consolidation.importance.omegas, callback.consolidation.importance.anchors
    assert omegas.keys() == plain.omega.keys()
    assert any((omega < 0).any() for omega in omegas.values()) == (not clamp)
    for name, expected in plain.omega.items():
        torch.testing.assert_close(omegas[name].double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(anchors[name].double(), plain.anchor[name], rtol=0, atol=0)


@pytest.mark.parametrize(("estimator", "merge"), [("fisher", "add"), ("mas", "decay"), ("si", "decay")])
def test_importances_are_merged_as_in_the_papers_by_default(estimator, merge):
    assert ImportancePenalty(estimator=estimator).consolidation.merge == merge
    assert ImportancePenalty(estimator=estimator, merge="average").consolidation.merge == "average"


@pytest.mark.parametrize("estimator", ["fisher", "mas", "si", "rwalk", "l2"])
def test_a_frozen_backbone_is_not_held(estimator):
    callback = ImportancePenalty(estimator=estimator)
    made = run(finetune(freeze_backbone=True), callback, max_epochs=1, options={"stop_after_task": 1})
    blocks = [f"head.blocks.{block}.{kind}" for block in range(2) for kind in ("weight", "bias")]
    assert list(callback.consolidation.importance.anchors) == blocks
    fresh = ImportancePenalty(estimator="fisher")  # as in a run that goes on where a task ends
    made.strategy.task = made.stream.tasks[1]
    made.datamodule.begin(made.strategy.task)
    fresh.on_task_end(made.trainer, made.strategy, made.strategy.task)
    assert list(fresh.consolidation.importance.anchors) == blocks


@pytest.mark.parametrize("loss_classes", ["task", "current"])
def test_rows_of_earlier_classes_gain_no_fisher_information_where_a_loss_does_not_see_them(loss_classes):
    kept = []

    class Look(ImportancePenalty):
        def on_task_end(self, trainer, strategy, task):
            super().on_task_end(trainer, strategy, task)
            kept.append(self.consolidation.importance.omegas["head.blocks.0.weight"])

    run(finetune(loss_classes=loss_classes), Look(), max_epochs=1)
    assert (kept[0] > 0).any()
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


def test_importance_is_measured_on_as_many_samples_as_asked_for_and_with_weight_0_on_none():
    seen = []

    class Counting(Finetune):
        def __init__(self, **options):
            super().__init__(**options)
            batches = self.passes.batches

            def counted(**options):
                for batch in batches(**options):
                    seen.append(len(batch))
                    yield batch

            self.passes.batches = counted

    for estimator in ("fisher", "mas"):
        for weight, expected in ((1.0, 60), (0.0, 0)):
            seen.clear()
            callback = ImportancePenalty(estimator=estimator, weight=weight, samples=20)
            run(Counting(backbone=plain_net, optimizer=sgd), callback, max_epochs=1)
            assert sum(seen) == expected


ESTIMATORS = [{"estimator": "si", "weight": 3.0, "xi": 0.01}, {"estimator": "mas", "weight": 1.0}]
COMMON = {"backbone": partial(MLP, hidden=(64,)), "optimizer": partial(torch.optim.SGD, lr=0.02)}


def test_importances_of_the_path_and_of_the_output_keep_old_domains():
    options = {"data": {"scenario": PermutedDomains(tasks=4), "batch_size": 32}, "max_epochs": 5}
    plain, *ours = (
        run(Finetune(**COMMON), *callbacks, **options).matrix.R_ci[3, 0]
        for callbacks in ([], *([ImportancePenalty(**estimator)] for estimator in ESTIMATORS))
    )
    assert min(ours) > plain + 0.1


def test_in_a_class_incremental_stream_importances_hardly_help_but_where_the_task_is_known():
    estimators = [{"estimator": "si", "weight": 1.0, "xi": 0.01}, {"estimator": "mas", "weight": 1.0}]
    plain, *ours = (
        run(Finetune(backbone=plain_net), *callbacks, max_epochs=4, gradient_clip_val=1.0).matrix
        for callbacks in ([], *([ImportancePenalty(**estimator)] for estimator in estimators))
    )
    # Measured: .30 (SI) and .33 (MAS) against .27; of old tasks that are known .93 and .97 against .77.
    for matrix in ours:
        assert abs(last_accuracy(matrix.R_ci) - last_accuracy(plain.R_ci)) < 0.15
        assert matrix.R_ti[-1, :-1].mean() > plain.R_ti[-1, :-1].mean() + 0.08


class FirstPenalty(ImportancePenalty):
    """Keeps the penalties of the first task."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def losses(self, strategy, batch, output):
        terms = super().losses(strategy, batch, output)
        if strategy.task.is_first:
            self.seen.append(float(terms["penalty"].detach()) if terms else None)
        return terms


def test_initial_weights_are_held_during_the_first_task_on_demand():
    callback = FirstPenalty(estimator="l2", weight=1.0, hold_initial=True)
    made = loop(finetune(backbone=plain_net), callback, options={"stop_after_task": 0})
    made.fit()
    assert callback.seen[0] == 0.0
    assert min(callback.seen[2:]) > 0
    free = FirstPenalty(estimator="l2", weight=1.0)
    other = loop(finetune(backbone=plain_net), free, options={"stop_after_task": 0})
    other.fit()
    assert set(free.seen) == {None}
    assert not torch.equal(
        made.strategy.network.backbone.layers[1].weight, other.strategy.network.backbone.layers[1].weight
    )


def test_initial_rows_of_the_head_are_not_held():
    callback = ImportancePenalty(estimator="l2", hold_initial=True)
    network = Network(plain_net((1, 8, 8)), LinearHead(16))
    network.head.grow(4)
    callback.on_task_start(None, SimpleNamespace(network=network), task_of(0))
    names = callback.consolidation.importance.anchors
    assert names
    assert all(name.startswith("backbone.") for name in names)


def test_initial_weights_need_the_estimator_l2():
    with pytest.raises(ValueError, match="use estimator 'l2'"):
        ImportancePenalty(estimator="si", hold_initial=True)


def test_wrong_options_are_errors():
    with pytest.raises(ValueError, match="weight is -1"):
        ImportancePenalty(weight=-1.0)
