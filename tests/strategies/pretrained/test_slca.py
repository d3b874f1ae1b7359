from functools import partial

import pytest
import torch
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks, samples_right
from support.runs import loop, plain_net
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.data import GaussianFeatures
from cl_lightning.measures import last_accuracy
from cl_lightning.memory import GaussianPrototypes
from cl_lightning.models import MLP, LinearHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.pretrained.slca import SLCA, mean_scales, normalised_logits
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, check_limit, check_strategy, small

SUBJECTS = {
    "SLCA": Subject(small(SLCA, align_options=PhaseOptions(epochs=2, batch_size=24), align_samples=8)),
}

PUBLISHED = {
    "slca": {
        "source": "GengDavid/SLCA: CIFAR-100, 20 epochs, milestone 18; slca.py (256 samples, 5 epochs)",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "lr_factors": {"backbone.*": 0.01},
        "align_options": {"epochs": 5, "batch_size": 256},
        "align_samples": 256,
        "align_temperature": 0.1,
        "mean_shrink": 0.1,
        "fresh_norm": True,
        "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "StepsOverPhase(at=[0.9])",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0.5071, 0.4867, 0.4408],
        "data.std": [0.2675, 0.2565, 0.2761],
        "data.transforms": [
            "RandomResizedCrop(scale=[0.08, 1.0], size=224)",
            "RandomHorizontalFlip()",
            "ColorJitter(brightness=0.247)",
        ],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "trainer.max_epochs": 20,
    },
}

wide = partial(MLP, hidden=(64,))


# ---------------------------------------------------------------------- the formulas


def test_logits_are_divided_by_the_mean_of_the_norms_over_tasks():
    logits = torch.tensor([[3.0, 4.0, 1.0], [0.0, 2.0, -6.0]], dtype=torch.float64)
    expected = logits / torch.tensor([[(5 + 1) / 2], [(2 + 6) / 2]]) / 0.5
    torch.testing.assert_close(normalised_logits(logits, [2, 1], 0.5), expected, rtol=1e-6, atol=0)


def test_the_scale_of_the_logits_does_not_change_the_loss():
    logits, labels = torch.randn(5, 7, dtype=torch.float64), torch.arange(5)
    losses = [F.cross_entropy(normalised_logits(s * logits, [3, 2, 2]), labels) for s in (0.01, 1.0, 300.0)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-4, atol=0)


def test_the_norm_is_bounded_below_and_the_default_temperature_is_a_tenth():
    logits = torch.tensor([[1e-7, 0.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[1e-7 / (1.5e-7) / 0.1, 0.0], [0.0, 0.0]], dtype=torch.float64)  # norms 2e-7 and 1e-7
    torch.testing.assert_close(normalised_logits(logits, [1, 1]), expected)


def test_means_of_older_classes_are_pulled_further():
    tasks = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    torch.testing.assert_close(mean_scales(tasks), torch.tensor([0.9 + 0.1 / 3, 1.0, 0.9 + 0.2 / 3, 1.0]))
    torch.testing.assert_close(mean_scales(tasks, 0.0), torch.ones(4))


def gaussians(spread):
    """Classes 0 and 2 of three."""
    found = GaussianPrototypes(4, jitter=1e-12)
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([10.0 * c + spread * torch.randn(50, 4, generator=generator) for c in (1, 2)])
    found.update(features, torch.tensor([0, 2]).repeat_interleave(50), num_classes=3)
    return found


def test_draws_without_spread_are_the_means_that_are_pulled():
    pool = GaussianFeatures(gaussians(0.0), 3, torch.tensor([0.5, 1.0, 1.0]))
    assert len(pool) == 6
    features, labels = pool.take(torch.tensor([5, 0, 2]), Draw.of(3, 1))
    assert labels.tolist() == [2, 0, 0]
    torch.testing.assert_close(features, torch.tensor([20.0, 5.0, 5.0])[:, None].expand(3, 4), rtol=0, atol=1e-4)


def test_draws_have_the_moments_of_their_class_and_processes_share_them_out():
    found = gaussians(2.0)
    pool = GaussianFeatures(found, 4000)
    rows, draw = torch.arange(8000), Draw(7, 0, 8000, 8000)
    features, labels = pool.take(rows, draw)
    for column in (0, 2):
        own = features[labels == column].double()
        torch.testing.assert_close(own.mean(0), found.means[column].double(), rtol=0, atol=0.2)
        covariance = (found.factors[column] @ found.factors[column].T).double()
        torch.testing.assert_close(own.T.cov(), covariance, rtol=0, atol=0.5)
    part, _ = pool.take(rows[3000:], Draw(7, 3000, 8000, 8000))
    torch.testing.assert_close(part, features[3000:])


# ---------------------------------------------------------------------- the method


def test_without_alignment_and_at_one_rate_it_is_fine_tuning_on_the_classes_of_the_task():
    options = {"backbone": plain_net, "head": LinearHead}
    check_limit(
        small(SLCA, lr_factors={}, align_options=PhaseOptions(epochs=0), **options),
        small(Finetune, loss_classes="current", **options),
    )


def test_heads_are_aligned_for_predictions_and_put_back_for_the_next_task():
    class Look(SLCA):
        def begin_phase(self, phase, origin, sources=()):
            super().begin_phase(phase, origin, sources)
            if self.task.index == 2 and phase.features is None:
                head = self.network.head
                assert head.blocks[0] is first
                for key, value in unaligned.items():
                    assert torch.equal(head.state_dict()[key], value)
                assert [block.weight.requires_grad for block in head.blocks] == [False, False, True]
                assert not any(parameter.requires_grad for parameter in self.unaligned_head.parameters())
                seen.append(len(unaligned))

    seen: list[int] = []
    made = loop(
        Look(backbone=plain_net, align_options=PhaseOptions(epochs=1)),
        data={"scenario": ClassIncremental(tasks=5)},
        max_epochs=1,
    )
    made.options = made.options.__class__(stop_after_task=1)
    made.fit()
    strategy = made.strategy
    unaligned = {key: value.clone() for key, value in strategy.unaligned_head.state_dict().items()}
    first, second = strategy.network.head.blocks
    assert not torch.equal(first.weight, unaligned["blocks.0.weight"])
    assert not torch.equal(second.weight, unaligned["blocks.1.weight"])
    made._run_task(made.stream.tasks[2], None)
    assert seen == [4]
    for key, value in unaligned.items():  # weight decay and momentum did not move them either
        assert torch.equal(strategy.unaligned_head.state_dict()[key], value)


def test_new_rows_are_small_and_biases_begin_at_0():
    strategy = SLCA(backbone=wide)
    strategy.build((1, 8, 8))
    head = strategy.network.head
    head.grow(500)
    assert float(head.weight().detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not head.blocks[0].bias.any()


def test_alignment_raises_old_classes_and_beats_fine_tuning():
    plain = finetuning_in_tasks({"backbone": wide}, 5, max_epochs=3)
    local = in_tasks(partial(SLCA, backbone=wide, align_options=PhaseOptions(epochs=0)), 5, max_epochs=3)
    made = in_tasks(partial(SLCA, backbone=wide, align_options=PhaseOptions(epochs=3)), 5, max_epochs=3)
    right = [samples_right(matrix) for matrix in (plain, local.matrix, made.matrix)]
    assert right == sorted(right)
    # Measured: .87 against .18.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.34
    old = [one.matrix.R_ci[-1, :4].mean() for one in (local, made)]
    assert old[1] > old[0]


def test_a_transformer_passes_the_suite():
    make = small(
        SLCA, backbone=TinyViT, fresh_norm=True, align_options=PhaseOptions(epochs=2, batch_size=24), align_samples=8
    )
    check_strategy(make, checks=["trains", "resume", "restores", "options", "data", "bytes"])


def test_a_fresh_norm_replaces_the_pretrained_one_alone_and_is_trained():
    kept, fresh = SLCA(backbone=PretrainedViT), SLCA(backbone=PretrainedViT, fresh_norm=True)
    for strategy in (kept, fresh):
        strategy.build((1, 8, 8))
    before, after = kept.network.backbone.state_dict(), fresh.network.backbone.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"model.norm.weight", "model.norm.bias"}
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = []
    handle = fresh.network.backbone.model.norm.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    with torch.no_grad():
        features = fresh.network.backbone.eval()(images)
    handle.remove()
    centred = tokens[0][:, 0] - tokens[0][:, 0].mean(1, keepdim=True)  # the class token, with weights 1 and biases 0
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    made = in_tasks(partial(SLCA, backbone=PretrainedViT, fresh_norm=True), 5, options={"stop_after_task": 0})
    assert not torch.equal(made.strategy.network.backbone.model.norm.weight, torch.ones(24))


def test_a_backbone_without_layer_norm_has_no_norm_to_reset():
    with pytest.raises(ValueError, match="SLCA: fresh_norm is True, but MLP has no LayerNorm"):
        SLCA(backbone=plain_net, fresh_norm=True).build((1, 8, 8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"align_samples": 0}, "align_samples is 0"),
        ({"align_temperature": 0.0}, "align_temperature is 0.0"),
        ({"mean_shrink": 2.0}, "mean_shrink is 2.0"),
        ({"jitter": 0.0}, "jitter is 0"),
        ({"head": partial(LinearHead, init_std=-1.0)}, "init_std is -1"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        SLCA(backbone=plain_net, **options).build((1, 8, 8))
