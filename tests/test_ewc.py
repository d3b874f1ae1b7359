from functools import partial

import torch
from callback_runs import assert_same, assert_same_run, plain_net, run, sgd

from cl_lightning.consolidation import Consolidation
from cl_lightning.network import Network
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.ewc import EWC
from cl_lightning.stream import PermutedDomains, SingleTask

EWC_SMALL = partial(EWC, backbone=plain_net, optimizer=sgd)


def test_with_weight_0_it_is_finetuning_to_the_bit():
    assert_same_run(run(EWC_SMALL(penalty_weight=0.0)), run(Finetune(backbone=plain_net, optimizer=sgd)))


def test_one_task_is_finetuning_to_the_bit():
    data = {"scenario": SingleTask()}
    assert_same_run(run(EWC_SMALL(), data=data), run(Finetune(backbone=plain_net, optimizer=sgd), data=data))


def test_a_stiff_penalty_holds_the_weights_that_matter():
    loose, stiff = (
        run(EWC(backbone=plain_net, penalty_weight=weight, on="backbone"), options={"stop_after_task": 1}, max_epochs=3)
        for weight in (0.0, 30.0)
    )
    first = run(EWC(backbone=plain_net, on="backbone"), options={"stop_after_task": 0}, max_epochs=3)
    omegas = first.strategy.consolidation.importance.omegas
    anchors = first.strategy.consolidation.importance.anchors

    def moved(made):
        weights = dict(made.strategy.network.named_parameters())
        return sum((omegas[name] * (weights[name] - anchors[name]).square()).sum() for name in anchors)

    assert moved(stiff) < 0.5 * moved(loose)


def test_it_forgets_less_than_finetuning_on_permuted_images():
    options = {"data": {"scenario": PermutedDomains(tasks=3)}, "max_epochs": 8}
    ewc = run(EWC(backbone=plain_net, penalty_weight=20.0, labels="exact"), **options)
    finetune = run(Finetune(backbone=plain_net), **options)
    assert ewc.matrix.R_ci[2, 0] > finetune.matrix.R_ci[2, 0] + 0.05


def test_it_hardly_helps_in_a_class_incremental_stream():
    ewc, finetune = (run(cls(backbone=plain_net), max_epochs=4) for cls in (EWC, Finetune))
    assert ewc.matrix.measures()["average_accuracy"] < finetune.matrix.measures()["average_accuracy"] + 0.15


def test_the_memory_of_importances_does_not_grow_with_the_tasks_but_for_the_head():
    sizes = []
    for stop in (0, 2):
        made = run(EWC_SMALL(on="backbone"), options={"stop_after_task": stop})
        sizes.append(made.strategy.bytes_kept()["importance"])
    assert sizes[0] == sizes[1] > 0


def test_online_ewc_with_one_task_so_far_is_ewc():
    options = {"stop_after_task": 1}
    assert_same_run(run(EWC_SMALL(), options=options), run(EWC_SMALL(online=True), options=options))


def test_the_penalty_of_online_ewc_anchors_at_the_last_weights():
    made = run(EWC_SMALL(online=True, decay=0.5))
    weights = dict(made.strategy.network.named_parameters())
    assert_same(
        made.strategy.consolidation.importance.anchors, {name: value.detach() for name, value in weights.items()}
    )


def test_what_is_held_is_chosen_by_name():
    network = run(EWC_SMALL(), options={"stop_after_task": 0}).strategy.network
    assert isinstance(network, Network)
    backbone = Consolidation(on="backbone").parameters_of(network)
    assert backbone
    assert all(name.startswith("backbone.") for name in backbone)
    assert set(Consolidation(on="all").parameters_of(network)) == set(dict(network.named_parameters()))


def test_the_penalty_is_zero_before_anything_was_consolidated():
    part = Consolidation("fisher", 3.0)
    assert torch.equal(part.penalty(), torch.tensor(0.0))
