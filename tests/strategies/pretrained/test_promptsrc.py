import math
from functools import partial

import pytest
import torch
from support.fakes import batch_of, normal
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks, tiny_transformer
from support.runs import StopAt, assert_same_run, loop, run
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import VPT
from cl_lightning.strategies.pretrained.promptsrc import (
    PromptSRC,
    feature_consistency,
    logit_consistency,
    running_share,
)
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "PromptSRC": Subject(
        small(PromptSRC, backbone=tiny_transformer, length=2, depth=1),
        first_task_is_finetuning=False,
        reason="prompts are trained, on a frozen backbone",
    ),
}

PUBLISHED = {
    "promptsrc": {
        "source": "muzairkhattak/PromptSRC: trainers/PromptSRC/vit_b16_c2_ep20_batch4_4+4ctx.yaml, SGD of Dassl",
        "backbone": "Timm(name=vit_base_patch16_clip_224.openai, pretrained=True)",
        "length": 4,
        "depth": 9,
        "spread": 0.02,
        "feature_weight": 10.0,
        "logit_weight": 1.0,
        "average_centre": 0.75,
        "average_width": 0.05,
        "optimizer": "SGD(lr=0.0025, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase(warmup=1)",
        "data.resize": 224,
        "data.center_crop": None,
        "data.interpolation": "bicubic",
        "data.mean": [0.48145466, 0.4578275, 0.40821073],
        "data.std": [0.26862954, 0.26130258, 0.27577711],
        "data.transforms": ["RandomResizedCrop(scale=[0.08, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 4,
        "trainer.max_epochs": 20,
    },
}

adam = partial(torch.optim.Adam, lr=0.03)
SMALL = partial(PromptSRC, backbone=TinyViT, length=2, depth=1, optimizer=adam)


def learnt(make, tasks=1, **options):
    made = loop(
        make(),
        data={"scenario": ClassIncremental(tasks=5)},
        options={"stop_after_task": tasks - 1},
        **{"max_epochs": 1, **options},
    )
    made.fit()
    return made


# ---------------------------------------------------------------------- terms


def test_the_distance_of_features_is_the_mean_absolute_difference_of_their_directions():
    v, v_0 = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).double(), torch.tensor([[4.0, 3.0], [5.0, 0.0]]).double()
    # directions (.6, .8) and (.8, .6): .2, .2; (0, 1) and (1, 0): 1, 1
    assert float(feature_consistency(v, v_0)) == pytest.approx((0.2 + 0.2 + 1 + 1) / 4, abs=1e-12)
    assert float(feature_consistency(7 * v, v)) == pytest.approx(0, abs=1e-12)


def test_the_divergence_of_logits_is_divided_by_the_number_of_classes():
    z = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]], dtype=torch.float64).log() + 3
    z_0 = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], dtype=torch.float64).log() - 1
    of_first = 0.5 * math.log(0.5 / 0.2) + 0.25 * math.log(0.25 / 0.3) + 0.25 * math.log(0.25 / 0.5)
    assert float(logit_consistency(z, z_0)) == pytest.approx(of_first / (2 * 3), abs=1e-12)


def test_the_divergence_is_over_the_chosen_classes_alone():
    z, z_0 = normal(4, 5, requires_grad=True), normal(4, 5, seed=1)
    columns = torch.tensor([False, True, True, False, True])
    loss = logit_consistency(z, z_0, columns)
    loss.backward()
    own = z.detach()[:, columns].requires_grad_()
    alone = logit_consistency(own, z_0[:, columns])
    alone.backward()
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(z.grad[:, columns], own.grad)
    p, q = own.detach().softmax(1), z_0[:, columns].softmax(1)
    torch.testing.assert_close(own.grad, (p - q) / (4 * 3))
    assert not z.grad[:, ~columns].any()


def test_what_is_frozen_gets_no_gradient():
    v_0, z_0 = normal(4, 5, requires_grad=True), normal(4, 5, seed=1, requires_grad=True)
    loss = feature_consistency(normal(4, 5, seed=2, requires_grad=True), v_0)
    (loss + logit_consistency(normal(4, 5, seed=3, requires_grad=True), z_0)).backward()
    assert v_0.grad is None
    assert z_0.grad is None


@pytest.mark.parametrize(("loss_classes", "first"), [("current", 2), ("all", 0)])
def test_the_loss_is_the_equation_of_the_paper(loss_classes, first):
    make = partial(SMALL, loss_classes=loss_classes, feature_weight=3.0, logit_weight=5.0)
    strategy = learnt(make, tasks=2).strategy.train()
    backbone, head = strategy.prompted, strategy.network.head
    batch = batch_of(torch.tensor([2, 3, 3, 2]), images=torch.randn(4, 1, 8, 8))
    output = strategy.network(batch.images)
    terms = strategy.losses(batch, output)
    backbone.peft.remove()  # for good: what follows is the transformer without tokens
    v_0 = backbone.base(batch.images)
    z, z_0 = output.logits[:, first:], head(v_0)[:, first:]
    v, v_0 = (rows / rows.norm(dim=1, keepdim=True) for rows in (output.features, v_0))
    torch.testing.assert_close(terms["ce"], F.cross_entropy(z, batch.labels - first))
    torch.testing.assert_close(terms["features"], 3.0 * F.l1_loss(v, v_0))
    log_p, log_q = z.log_softmax(1), z_0.log_softmax(1)
    kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True) / z.numel()
    torch.testing.assert_close(terms["logits"], 5.0 * kl)
    assert terms.keys() == {"ce", "features", "logits"}
    assert min(float(term.detach()) for term in terms.values()) > 1e-4


def test_tokens_and_rows_of_the_task_are_trained():
    made = learnt(SMALL)
    before = {name: value.clone() for name, value in made.strategy.state_dict().items()}
    made._run_task(made.stream.tasks[1], None)
    state = made.strategy.state_dict()
    moved = {name for name, value in before.items() if "network." in name and not torch.equal(state[name], value)}
    assert moved == {"network.backbone.peft.sites.0.tokens"}


def test_with_weights_0_it_is_prompt_tuning():
    plain = {"feature_weight": 0.0, "logit_weight": 0.0, "average_centre": None}
    made, term = (run(SMALL(**plain | extra), max_epochs=1) for extra in ({}, {"feature_weight": 1e-30}))
    assert_same_run(made, term)
    batch = batch_of(torch.tensor([8, 9]), images=torch.randn(2, 1, 8, 8))
    strategy = made.strategy
    assert strategy.losses(batch, strategy.network(batch.images)).keys() == {"ce"}


def test_initial_tokens_have_the_spread_and_the_last_ones_stay():
    strategy = PromptSRC(backbone=partial(TinyViT, depth=4), length=50, depth=3)
    strategy.build((1, 8, 8))
    peft = strategy.prompted.peft
    assert isinstance(peft, VPT)
    tokens = torch.stack([site.tokens.detach() for site in peft.sites])
    assert tokens.shape == (3, 50, 24)
    assert float(tokens.std()) == pytest.approx(0.02, rel=0.05)
    lengths = []
    for block in strategy.prompted.base.model.blocks:
        block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    strategy.prompted(torch.randn(2, 1, 8, 8))
    assert lengths[-1] == 5 + 50


# ---------------------------------------------------------------------- average


def gaussian_weights(epochs, centre, width):
    density = torch.distributions.Normal(centre * epochs, width * epochs)
    weights = density.log_prob(torch.arange(1, epochs + 1, dtype=torch.float64)).exp()
    return weights / weights.sum()


@pytest.mark.parametrize(("epochs", "centre", "width"), [(20, 0.75, 0.05), (7, 0.3, 0.4), (1, 0.75, 0.05)])
def test_the_running_average_is_the_weighted_sum(epochs, centre, width):
    points, average = normal(epochs, 3), torch.zeros(3, dtype=torch.float64)
    for epoch in range(1, epochs + 1):
        share = running_share(epoch, centre * epochs, width * epochs)
        average = average.lerp(points[epoch - 1], share)
    torch.testing.assert_close(average, gaussian_weights(epochs, centre, width) @ points)


def test_the_peak_of_20_epochs_is_the_15th():
    weights = gaussian_weights(20, 0.75, 0.05)
    share = running_share(15, 15.0, 1.0)
    assert share == pytest.approx(float(weights[14] / weights[:15].sum()))
    assert int(weights.argmax()) == 14


def test_a_share_is_a_number_where_all_weights_vanish():
    assert running_share(1, 750.0, 0.5) == 1.0
    assert running_share(2, 750.0, 0.5) == pytest.approx(1.0)
    assert running_share(2, 0.0, 0.01) == 0.0


class Recording(PromptSRC):
    """Keeps what is trained at the end of each epoch."""

    def on_train_epoch_end(self):
        self.ends = [*getattr(self, "ends", []), self._trained()]
        super().on_train_epoch_end()
        self.averaged = self.weights["average"].keys()

    def _trained(self):
        return {name: p.detach().clone() for name, p in self.network.named_parameters() if p.requires_grad}


def test_a_task_ends_with_the_average_over_its_epochs():
    options = {"backbone": TinyViT, "length": 2, "depth": 1, "optimizer": adam}
    strategy = learnt(
        partial(Recording, average_centre=0.5, average_width=0.3, **options), tasks=2, max_epochs=4
    ).strategy
    weights = gaussian_weights(4, 0.5, 0.3).float()
    ends, parameters = strategy.ends[4:], dict(strategy.network.named_parameters())
    assert len(strategy.ends) == 8
    assert ends[0].keys() == {
        "backbone.peft.sites.0.tokens",
        "head.blocks.1.weight",
        "head.blocks.1.bias",
    }
    assert strategy.averaged == ends[0].keys()
    for name, value in ends[-1].items():
        expected = torch.tensordot(weights, torch.stack([end[name] for end in ends]), dims=1)
        torch.testing.assert_close(parameters[name], expected)
        assert not torch.allclose(parameters[name], value)
    assert "average" not in strategy.weights


def test_without_an_average_the_last_weights_stay():
    options = {"backbone": TinyViT, "length": 2, "depth": 1, "optimizer": adam}
    strategy = learnt(partial(Recording, average_centre=None, **options), max_epochs=2).strategy
    parameters = dict(strategy.network.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in strategy.ends[-1].items())


class StopInTheLastEpoch(StopAt):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.epoch == 1:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def test_the_average_is_resumed(tmp_path):
    make = partial(SMALL, average_centre=0.5, average_width=0.3)
    options = {"data": {"batch_size": 128}, "max_epochs": 2}
    saving = {"save_every_n_steps": 1, "save_every_seconds": 0.0}
    with pytest.raises(StopAt.CrashError):
        loop(make(), StopInTheLastEpoch(1, 2), folder=tmp_path, options=saving, **options).fit()
    resumed = loop(make(), folder=tmp_path, options=saving, **options)
    resumed.fit("last")
    assert_same_run(run(make(), **options), resumed)


# ---------------------------------------------------------------------- behaviour


def test_it_forgets_less_than_prompts_without_regularisation_and_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    made, tuned = (
        in_tasks(partial(SMALL, backbone=PretrainedViT, **options), 5, max_epochs=2).matrix.R_ci
        for options in ({}, {"feature_weight": 0.0, "logit_weight": 0.0})
    )
    # Measured: .41; without regularisation .37, fine-tuning .24.
    assert last_accuracy(made) > last_accuracy(tuned) + 0.02
    assert last_accuracy(made) > last_accuracy(plain.R_ci) + 0.1


def test_all_domains_train_the_same_tokens():
    made = run(SMALL(), data={"scenario": RotatedDomains(degrees=[0.0, 90.0]), "batch_size": 256}, max_epochs=1)
    assert made.strategy.network.head.block_sizes() == [10]
    assert made.matrix.R_ci[1].isfinite().all()


def test_all_classes_pass_the_suite():
    over_all = small(PromptSRC, backbone=tiny_transformer, length=2, depth=None, loss_classes="all")
    check_strategy(over_all, checks=["trains"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "length is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": 3}, "depth is 3; give at most 2, the number of blocks"),
        ({"spread": -0.1}, "spread is -0.1"),
        ({"feature_weight": -1.0}, "feature_weight is -1.0"),
        ({"logit_weight": -1.0}, "logit_weight is -1.0"),
        ({"average_centre": 1.5}, "average_centre is 1.5"),
        ({"average_width": 0.0}, "average_width is 0.0"),
        ({"loss_classes": "new"}, "loss_classes is 'new'"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        partial(SMALL, **options)().build((1, 8, 8))
