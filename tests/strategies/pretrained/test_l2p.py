from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fakes import batch_of
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks, tiny_transformer
from support.runs import loop
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import LinearHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.pretrained.l2p import L2P
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, check_strategy, small

SLOW = "each step runs the network twice, once for the query; two more configurations pass the suite"

SUBJECTS = {
    "L2P": Subject(
        small(L2P, backbone=tiny_transformer, pool_size=5, length=2, top_k=2),
        first_task_is_finetuning=False,
        reason="prompts are trained, on a frozen backbone",
    ),
}

PUBLISHED = {
    "l2p": {
        "source": "google-research/l2p: configs/cifar100_l2p.py; 0.03 * 128 / 256",
        "backbone": "Timm(name=vit_base_patch16_224.orig_in21k, pretrained=True)",
        "pool_size": 10,
        "length": 10,
        "top_k": 4,
        "key_weight": 1.0,
        "batchwise_prompt": "training",
        "optimizer": "Adam(lr=0.015)",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bilinear",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "trainer.max_epochs": 5,
        "trainer.gradient_clip_val": 1.0,
    },
}

adam = partial(torch.optim.Adam, lr=0.03)
SMALL = partial(L2P, backbone=TinyViT, pool_size=6, length=3, top_k=2, optimizer=adam)


def learnt(make, tasks=1, **options):
    made = loop(make(), data={"scenario": ClassIncremental(tasks=5)}, max_epochs=1, **options)
    made.options = made.options.__class__(stop_after_task=tasks - 1, dry_run=False)
    made.fit()
    return made


def images(count=7):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_losses_match_the_paper():
    strategy = learnt(partial(SMALL, key_weight=0.5, batchwise_prompt="never"), tasks=2).strategy.train()
    backbone, batch = strategy.network.backbone, batch_of(torch.tensor([2, 3, 3, 2]), images=images(4))
    output = strategy.network(batch.images)
    terms = strategy.losses(batch, output)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(output.logits[:, 2:], batch.labels - 2))
    cosines = F.cosine_similarity(backbone.query(batch.images)[:, None], backbone.prompts.keys, dim=2)
    torch.testing.assert_close(terms["keys"], -0.5 * cosines.topk(2, dim=1).values.sum(1).mean())


@pytest.mark.parametrize("batchwise_prompt", ["training", "never"])
def test_predictions_do_not_depend_on_the_batch_even_after_a_vote(batchwise_prompt):
    strategy = learnt(partial(SMALL, batchwise_prompt=batchwise_prompt)).strategy.eval()
    with torch.no_grad():
        together = strategy.predict(images())
        alone = torch.cat([strategy.predict(image[None]) for image in images()])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_where_a_batch_votes_its_samples_take_the_same_prompts():
    strategy = learnt(partial(SMALL, batchwise_prompt="always", low=-1.0, high=1.0)).strategy.eval()
    pool, backbone = strategy.network.backbone.prompts, strategy.network.backbone
    assert strategy.traits.transductive
    with torch.no_grad():
        voted = pool.votes(backbone.query(images())).argsort(descending=True, stable=True)[:2]
        scores = strategy.predict(images())
        pool.choice = voted
        torch.testing.assert_close(scores, strategy.network(images()).logits)


def test_only_prompts_keys_and_rows_of_the_task_are_trained():
    made = learnt(SMALL)
    strategy, before = made.strategy, {k: v.clone() for k, v in made.strategy.state_dict().items()}
    made._run_task(made.stream.tasks[1], None)
    state = strategy.state_dict()
    moved = {name for name, value in before.items() if "network." in name and not torch.equal(state[name], value)}
    assert moved == {"network.backbone.prompts.prompts", "network.backbone.prompts.keys"}
    assert "network.head.blocks.1.weight" in state


def test_without_their_term_keys_stay():
    keys = learnt(partial(SMALL, key_weight=0.0)).strategy.network.backbone.prompts.keys
    assert float(keys.min()) >= 0
    assert float(keys.max()) < 0.01  # as they were drawn


def test_without_prompts_logits_match_a_linear_classifier_on_the_class_token():
    strategy = learnt(partial(SMALL, readout="token")).strategy.eval().double()
    network, x = strategy.network, images().double()
    with torch.no_grad():
        prompted, plain = network(x).logits, network.head(network.backbone.base(x))
        assert not torch.allclose(prompted, plain)
        network.backbone.prompts._enable = lambda enabled: None
        assert torch.equal(network(x).logits, plain)


def test_prompts_that_do_nothing_leave_a_linear_probe_of_the_class_token():
    still = partial(torch.optim.SGD, lr=0.1)
    zeros = partial(LinearHead, init_std=0.0)
    options = {"backbone": TinyViT, "optimizer": still, "head": zeros}
    probe = in_tasks(partial(Finetune, freeze_backbone=True, loss_classes="current", **options), 2)
    made = loop(
        L2P(readout="token", top_k=1, length=1, **options),
        data={"scenario": ClassIncremental(tasks=2)},
        max_epochs=1,
    )
    made.strategy.build((1, 8, 8))
    made.strategy.network.backbone.prompts._enable = lambda enabled: None  # never on
    made.fit()
    torch.testing.assert_close(made.matrix.R_ci, probe.matrix.R_ci, equal_nan=True)


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    made = in_tasks(partial(SMALL, backbone=PretrainedViT, length=1), 5, max_epochs=3)
    # Measured: .55 against .24.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.15


@pytest.mark.parametrize("options", [{"batchwise_prompt": "never", "readout": "token"}, {"batchwise_prompt": "always"}])
def test_other_options_pass_the_suite(options):
    variant = small(L2P, backbone=tiny_transformer, pool_size=5, length=2, top_k=2, **options)
    check_strategy(variant, checks=["trains", "seed", "resume", "restores", "options", "data", "bytes"])


def test_how_many_prompts_are_in_use_is_logged():
    rows: list[dict[str, float]] = []

    class Noting(L2P):
        @property
        def loggers(self):
            return [SimpleNamespace(log_metrics=lambda metrics, step: rows.append(metrics))]

    made = learnt(
        partial(Noting, **{**SMALL.keywords, "batchwise_prompt": "never", "key_weight": 0.0, "low": -1.0, "high": 1.0})
    )
    pool, counts = made.strategy.network.backbone.prompts, torch.zeros(6)
    made.datamodule.begin(made.stream.tasks[0])
    for batch in made.strategy.passes.batches():
        counts += pool.votes(made.strategy.network.backbone.query(batch.images))
    share = counts / counts.sum()
    assert [row["prompts/used"] for row in rows if "prompts/used" in row] == [
        pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-3)
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key_weight": -1.0}, "key_weight is -1.0"),
        ({"batchwise_prompt": "sometimes"}, "batchwise_prompt is 'sometimes'"),
        ({"top_k": 11}, "top_k is 11"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        L2P(backbone=TinyViT, **options).build((1, 8, 8))
