from functools import cache, partial

import pytest
import torch
from support.pretrained import finetuning_in_tasks, in_tasks, samples_right
from support.runs import NormNet, loop, plain_net
from torch.nn import functional as F

from cl_lightning.memory import fisher_diagonal, shifted
from cl_lightning.memory.weight_space import average
from cl_lightning.models import MLP, SSF, LoRA, in_eval_mode
from cl_lightning.strategies.pretrained.ita import ITA, limited
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental, RotatedDomains, Subset
from cl_lightning.testing import Subject, small

SHORT = {
    "probe_options": PhaseOptions(epochs=1),
    "align_options": PhaseOptions(epochs=1, batch_size=24),
    "align_more": 0,
    "align_samples": 4,
}
NO_HEAD = {"probe_options": PhaseOptions(epochs=0), "align_options": PhaseOptions(epochs=0)}
LOW_RANK = partial(LoRA, rank=2, scale=0.5, targets=["*"])
SUBJECTS = {
    "ITA": Subject(
        small(ITA, fisher_samples=10, **SHORT),
        first_task_is_finetuning=False,
        reason="the rows of the head are trained before the backbone",
    ),
    "ITA with the pull alone": Subject(small(ITA, pull_weight=5.0, fisher_labels="sampled", **NO_HEAD)),
    "ITA with LoRA": Subject(
        small(ITA, peft=LOW_RANK, pull_weight=5.0, fisher_labels="sampled", **NO_HEAD),
        first_task_is_finetuning=False,
        reason="the backbone is frozen",
    ),
}

SLOW = "three phases in each task, and an importance that takes a backward pass per class"

wide = partial(MLP, hidden=(64,))
SMALL = Subset(ClassIncremental(tasks=5), per_class=12)
LEARNS = {
    "backbone": wide,
    "probe_options": PhaseOptions(epochs=1),
    "align_options": PhaseOptions(epochs=2),
    "align_samples": 64,
    "align_more": 0,
    "fisher_samples": 100,
}
BY_HAND = 0.5  # pull of the runs in which F is also computed by a gradient for each sample and class


def weights(strategy):
    return {name: value.detach().clone() for name, value in strategy.network.named_parameters()}


def backbone_of(found):
    return {name: value for name, value in found.items() if name.startswith("backbone.")}


class Look(ITA):
    """Keeps the weights before the first task, at the start of each phase and when each task ends, and F by hand."""

    def begin_task(self, task):
        if task.is_first:
            self.before, self.starts, self.ends, self.fishers, self.pulls = weights(self), [], [], [], []
            self.phase_starts = []
        super().begin_task(task)
        self.starts.append(weights(self))

    def on_train_start(self):
        super().on_train_start()
        self.phase_starts.append((self.task.index, self.phase.name, self.phase.options.epochs, weights(self)))
        if self.phase.name == "train" and self.pull_weight == BY_HAND:
            self.fishers.append(by_hand(self))

    def edit_gradients(self, batch):
        before, past = weights(self), self.importance.omegas
        super().edit_gradients(batch)
        self.pulls.append((self.task.index, self.phase.name, before, weights(self), past))

    def end_task(self, task):
        self.ends.append(weights(self))
        super().end_task(task)


def by_hand(strategy):
    """F of the linear layers, a gradient for each sample and class of the task."""
    network, total, rows = strategy.network, {}, 0
    columns = strategy.task_columns[-1].nonzero().squeeze(1)
    with in_eval_mode(network):
        for batch in strategy.passes.batches():
            for image in batch.images:
                values = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
                logits = torch.func.functional_call(network, values, (image[None],)).logits[0, columns]
                log_p, names = logits.log_softmax(0), list(backbone_of(values))
                for place in range(len(columns)):
                    found = torch.autograd.grad(log_p[place], [values[name] for name in names], retain_graph=True)
                    for name, gradient in zip(names, found, strict=True):
                        total[name] = total.get(name, 0) + log_p[place].exp().detach() * gradient.square()
                rows += 1
    return {name: value / rows for name, value in total.items()}


@cache
def learnt(tasks=3, scenario=SMALL, **options):
    made = loop(
        Look(**{"backbone": plain_net, **SHORT, **options}),
        data={"scenario": scenario, "batch_size": 16},
        options={"stop_after_task": tasks - 1},
        max_epochs=1,
    )
    made.fit()
    return made.strategy


def test_each_task_begins_with_the_first_backbone_and_the_mean_of_the_networks_predicts():
    strategy = learnt()
    for start in strategy.starts:
        for name, value in backbone_of(strategy.before).items():
            assert torch.equal(start[name], value), name
    for name, found in backbone_of(weights(strategy)).items():
        expected = torch.stack([end[name].double() for end in strategy.ends]).mean(0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(strategy.ends[1][name], strategy.ends[2][name])
    assert torch.equal(weights(strategy)["head.blocks.2.weight"], strategy.ends[2]["head.blocks.2.weight"])
    assert int(strategy.weights.sets) == 4


def test_the_composition_of_one_task_is_its_own_network():
    strategy = learnt(tasks=1)
    for name, value in weights(strategy).items():
        assert torch.equal(value, strategy.ends[0][name])


def test_a_composition_gains_the_spread_of_its_parts_for_a_quadratic_loss():
    draw = torch.Generator().manual_seed(0)
    root, slope, *parts = (torch.randn(6, n, generator=draw, dtype=torch.float64) for n in (6, 1, 1, 1, 1))
    hessian = root @ root.T

    def loss(tau):
        return float(slope.T @ tau + tau.T @ hessian @ tau / 2)

    start = {"w": torch.randn(6, 1, generator=draw, dtype=torch.float64)}
    merged = shifted(start, average([{"w": part} for part in parts]))["w"] - start["w"]
    spread = sum(float((one - other).T @ hessian @ (one - other)) for i, one in enumerate(parts) for other in parts[:i])
    mean = sum(loss(part) for part in parts) / 3
    assert mean - loss(merged) == pytest.approx(spread / 2 / 9, rel=1e-10)


def test_importances_of_earlier_tasks_are_means_over_their_samples():
    sizes = Subset(ClassIncremental(sizes=(4, 2, 3, 1)), per_class=6)
    strategy = learnt(scenario=sizes, pull_weight=BY_HAND)
    first, second, third = strategy.fishers
    assert strategy.counts.tolist() == [54, 0]
    past = [next(entry[4] for entry in strategy.pulls if entry[:2] == (task, "train")) for task in range(3)]
    assert past[0] == {}
    for name in first:
        torch.testing.assert_close(past[1][name], first[name], rtol=1e-4, atol=1e-7)
        two = (24 * first[name] + 12 * second[name]) / 36
        torch.testing.assert_close(past[2][name], two, rtol=1e-4, atol=1e-7)
        every = (36 * two + 18 * third[name]) / 54
        torch.testing.assert_close(strategy.importance.omegas[name], every, rtol=1e-4, atol=1e-7)
        assert torch.equal(strategy.importance.anchors[name], strategy.before[name])


@pytest.mark.parametrize("limit", [100.0, 0.001])
def test_each_step_of_train_is_pulled_to_the_first_weights(limit):
    strategy = learnt(
        **NO_HEAD,
        pull_weight=2.0,
        pull_limit=limit,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.25),
        scheduler_interval="step",
    )
    moved = clipped = 0
    for task, phase, before, after, past in strategy.pulls:
        if phase != "train" or task == 0:
            assert all(torch.equal(before[name], value) for name, value in after.items())
            continue
        steps = moved % 2  # two steps of 24 images in batches of 16
        moved += 1
        pull = {name: 2.0 * value * (before[name] - strategy.before[name]) for name, value in past.items()}
        norms = {name: float(value.norm()) for name, value in pull.items()}
        for name, value in after.items():
            factor = limit / max(limit, norms.get(name, 0.0))
            expected = before[name] - (factor * pull[name] if name in pull else 0)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        assert (max(norms.values()) > 0) == (steps == 1)
        clipped += sum(norm > limit for norm in norms.values())
    assert moved == 4
    assert (clipped > 0) == (limit < 1)


def test_the_schedule_multiplies_the_pull():
    rates = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.25)
    strategy = learnt(pull_weight=2.0, scheduler=rates, scheduler_interval="step", **NO_HEAD)
    pulled = [entry for entry in strategy.pulls if entry[:2] == (2, "train")]
    _, _, before, after, past = pulled[1]
    for name, value in past.items():
        gap = before[name] - strategy.before[name]
        torch.testing.assert_close(after[name], before[name] - 0.25 * 2.0 * value * gap, rtol=1e-5, atol=1e-8)
    assert any(not torch.equal(before[name], after[name]) for name in past)


def test_each_tensor_of_a_pull_is_scaled_to_the_limit():
    vector = {"a": torch.tensor([3.0, 4.0], dtype=torch.float64), "b": torch.tensor([[0.5]], dtype=torch.float64)}
    torch.testing.assert_close(limited(vector, 1.0)["a"], torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert torch.equal(limited(vector, 1.0)["b"], vector["b"])
    assert torch.equal(limited({"a": torch.zeros(2)}, 1.0)["a"], torch.zeros(2))


def test_the_importance_of_a_softmax_layer_has_its_closed_form():
    strategy = learnt(tasks=1, backbone=partial(MLP, hidden=()))
    network = strategy.network.double()
    batches = [batch.replace(images=batch.images.double()) for batch in strategy.passes.batches()]
    names = {"head.blocks.0.weight": network.head.blocks[0].weight}
    found = fisher_diagonal(network, names, batches)["head.blocks.0.weight"]
    x = torch.cat([batch.images for batch in batches]).flatten(1)
    p = network.head(x).detach().softmax(1)
    torch.testing.assert_close(found, (p * (1 - p)).T @ x.square() / len(x))


def test_the_head_is_prepared_with_the_first_backbone():
    strategy = learnt(align_more=2)
    order = [(task, name, epochs) for task, name, epochs, _ in strategy.phase_starts]
    assert order == [
        (task, *phase) for task in range(3) for phase in (("probe", 1), ("align", 1 + 2 * task), ("train", 1))
    ]
    found = {(task, name): value for task, name, _, value in strategy.phase_starts}
    for value in found.values():
        assert all(torch.equal(value[name], start) for name, start in backbone_of(strategy.before).items())
    old, new = "head.blocks.0.weight", "head.blocks.2.weight"
    assert torch.equal(found[2, "probe"][old], found[2, "align"][old])
    assert not torch.equal(found[2, "probe"][new], found[2, "align"][new])
    assert not torch.equal(found[2, "align"][old], found[2, "train"][old])
    assert torch.equal(found[2, "train"][old], strategy.ends[2][old])
    assert not torch.equal(found[2, "train"][new], strategy.ends[2][new])


def test_drawn_features_are_of_the_first_backbone():
    strategy = learnt(scenario=Subset(ClassIncremental(tasks=5), per_class=5))
    network = strategy.network
    for name, value in backbone_of(strategy.before).items():
        network.get_parameter(name).data.copy_(value)
    features, labels = strategy.passes.features()
    for column in (4, 5):
        torch.testing.assert_close(strategy.gaussians.means[column], features[labels == column].mean(0))
    assert strategy.gaussians.known.tolist() == [True] * 6


def test_the_loss_of_align_is_over_all_classes_with_logits_of_one_norm():
    strategy = learnt(align_temperature=0.5)
    strategy.phase = strategy.phases(strategy.task)[1]
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(8, 6, generator=draw), torch.arange(8) % 6
    batch = next(iter(strategy.passes.batches(samples=8))).replace(labels=labels)
    loss = strategy.losses(batch, type("Given", (), {"logits": logits}))["ce"]
    expected = F.cross_entropy(logits / (0.5 * logits.norm(dim=1, keepdim=True)), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_tasks_can_be_left_out_of_the_composition():
    strategy = learnt(tasks=2)
    both = backbone_of(weights(strategy))
    try:
        for chosen, expected in (
            ([], strategy.before),
            ([1], strategy.ends[1]),
            ([1, 0], both),
        ):
            strategy.compose(chosen)
            for name, value in backbone_of(weights(strategy)).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
        for wrong in ([2], [0, 0], [-1]):
            with pytest.raises(ValueError, match=r"ITA: compose got .* give different tasks from 0 to 1"):
                strategy.compose(wrong)
    finally:
        strategy.compose([0, 1])


@pytest.mark.parametrize("freeze_norm", ["never", "always"])
def test_running_statistics_begin_as_before_and_end_as_the_composed_ones(freeze_norm):
    strategy = learnt(tasks=2, backbone=NormNet, freeze_norm=freeze_norm)
    norm, linear = strategy.network.backbone.layers[2], strategy.network.backbone.layers[1]
    if freeze_norm == "always":
        assert torch.equal(norm.running_mean, torch.zeros(16))
    else:
        inputs = torch.cat([batch.images for batch in strategy.passes.batches()]).flatten(1)
        with torch.no_grad():
            expected = linear(inputs).mean(0)
        torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-5)
    kept = strategy.weights["start"]["backbone.layers.2.running_mean"]
    assert torch.equal(kept, torch.zeros(16))


def test_tasks_without_new_classes_are_composed_too():
    strategy = learnt(scenario=Subset(RotatedDomains(degrees=(0.0, 30.0, 60.0)), per_class=5), **NO_HEAD)
    assert len(strategy.network.head.blocks) == 1
    name = next(iter(backbone_of(strategy.before)))
    expected = torch.stack([end[name] for end in strategy.ends]).mean(0)
    torch.testing.assert_close(weights(strategy)[name], expected, rtol=1e-5, atol=1e-6)


def test_frozen_weights_have_neither_importance_nor_change():
    strategy = learnt(tasks=2, freeze_backbone=True)
    assert not strategy.importance
    for name, value in backbone_of(strategy.before).items():
        assert torch.equal(weights(strategy)[name], value)


def low_rank(kept, name="0"):
    """tau of the only layer, by hand."""
    return 0.5 * kept[f"sites.{name}.up"][0] @ kept[f"sites.{name}.down"][0]


def test_low_rank_modules_of_all_tasks_are_composed_as_whole_matrices():
    strategy = learnt(peft=LOW_RANK)
    name, kept = "backbone.base.layers.1.weight", [strategy.weights[f"task_{task}"] for task in range(3)]
    start = strategy.before[name]
    for begun, ended, own in zip(strategy.starts, strategy.ends, kept, strict=True):
        assert torch.equal(begun[name], start)
        assert torch.equal(ended[name], start)
        assert not begun["backbone.peft.sites.0.up"].any()
        assert torch.equal(own["sites.0.up"], ended["backbone.peft.sites.0.up"])
    downs = [begun["backbone.peft.sites.0.down"] for begun in strategy.starts]
    assert not torch.equal(downs[0], downs[1])
    taus = [low_rank(own) for own in kept]
    torch.testing.assert_close(weights(strategy)[name], start + (taus[0] + taus[1] + taus[2]) / 3)
    assert not weights(strategy)["backbone.peft.sites.0.up"].any()
    for task, tau in enumerate(taus):
        assert tau.any()
        torch.testing.assert_close(strategy.task_change(task)[name], tau)
        assert not weights(strategy)["backbone.peft.sites.0.up"].any()
    assert len(strategy.network.backbone.base.layers[1]._forward_hooks) == 1
    strategy.compose([2, 0])
    torch.testing.assert_close(weights(strategy)[name], start + (taus[0] + taus[2]) / 2)
    strategy.compose([])
    assert torch.equal(weights(strategy)[name], start)
    strategy.compose([0, 1, 2])


@pytest.mark.parametrize("limit", [100.0, 0.001])
def test_the_pull_of_low_rank_modules_is_the_gradient_of_the_penalty_of_whole_matrices(limit):
    adam = partial(torch.optim.Adam, lr=0.05)
    strategy = learnt(peft=LOW_RANK, pull_weight=2000.0, pull_limit=limit, optimizer=adam, **NO_HEAD)
    pulled = [entry for entry in strategy.pulls if entry[0] == 2][1]
    _, _, before, after, past = pulled
    up, down = (before[f"backbone.peft.sites.0.{part}"].double().requires_grad_() for part in ("up", "down"))
    assert up.any()
    omega = past["backbone.base.layers.1.weight"].double()
    assert list(past) == ["backbone.base.layers.1.weight"]
    (2000.0 / 2 * (omega * (0.5 * up[0] @ down[0]).square()).sum()).backward()
    for part, value in (("up", up), ("down", down)):
        scaled = value.grad / max(1.0, float(value.grad.norm()) / limit)
        moved = after[f"backbone.peft.sites.0.{part}"].double()
        torch.testing.assert_close(before[f"backbone.peft.sites.0.{part}"] - moved, scaled, rtol=1e-3, atol=1e-7)
        assert (value.grad.norm() > limit) == (limit < 1)


def test_importances_with_low_rank_modules_are_of_whole_matrices_at_the_first_weights():
    strategy = learnt(peft=LOW_RANK, pull_weight=BY_HAND, tasks=2)
    name = "backbone.base.layers.1.weight"
    expected = (strategy.fishers[0][name] + strategy.fishers[1][name]) / 2
    torch.testing.assert_close(strategy.importance.omegas[name], expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(strategy.importance.anchors[name], strategy.before[name])


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="ITA: peft is SSF; use LoRA"):
        ITA(backbone=NormNet, peft=SSF).build((1, 8, 8))


def test_low_rank_modules_forget_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": wide}, 5, max_epochs=3)
    options = {**LEARNS, "peft": partial(LoRA, rank=4, targets=["*"]), "pull_weight": 0.5}
    made = in_tasks(partial(ITA, **options), 5, max_epochs=3)
    # Measured: 62 and 305 of 360.
    right = [samples_right(matrix) for matrix in (plain, made.matrix)]
    assert right[1] > right[0] + 50


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": wide}, 5, max_epochs=3)
    made = in_tasks(partial(ITA, **LEARNS), 5, max_epochs=3)
    # Measured: 62 and 292 of 360.
    right = [samples_right(matrix) for matrix in (plain, made.matrix)]
    assert right[1] > right[0] + 50


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pull_weight": -1.0}, r"ITA: pull_weight is -1\.0"),
        ({"pull_limit": 0.0}, r"pull_limit is 0\.0"),
        ({"align_more": -1}, "align_more is -1"),
        ({"align_samples": 0}, "align_samples is 0"),
        ({"align_temperature": 0.0}, r"align_temperature is 0\.0"),
        ({"fisher_labels": "mean"}, "fisher_labels is 'mean'"),
        ({"fisher_samples": 0}, "fisher_samples is 0"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        ITA(**options)
