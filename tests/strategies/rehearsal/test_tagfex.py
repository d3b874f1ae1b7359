from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.expanding import Watch, begin, grown, part
from support.fakes import normal
from support.runs import NormNet, assert_same, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.batch import cat
from cl_lightning.data import RandomCrop
from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, CifarResNet, LinearHead
from cl_lightning.strategies.rehearsal.der_expand import DERExpand
from cl_lightning.strategies.rehearsal.tagfex import TagFex, transferred
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_limit, small

PUBLISHED = {
    "tagfex_cifar100": {
        "source": "bwnzheng/TagFex_CVPR2025: configs/all_in_one/cifar100_10-10_tagfex_resnet18.yaml, augmentation.py",
        "memory_size": 2000,
        "aux_weight": 2.0,
        "contrast_weight": 1.0,
        "predict_weight": 2.0,
        "merge_weight": 1.0,
        "transfer_weight": 1.0,
        "contrast_temperature": 0.2,
        "transfer_temperature": 2.0,
        "mix": 0.05,
        "projection_hidden": 2048,
        "projection_size": 1024,
        "attention_heads": 8,
        "backbone": "ResNet18",
        "first_optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "first_scheduler": "MultiStepLR(gamma=0.1, milestones=[60, 120, 170])",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0002)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[80, 120, 150])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "data.transforms": [
            "RandomCrop(padding=4)",
            "RandomHorizontalFlip()",
            "ColorJitter(brightness=0.247)",
            "AutoAugment()",
            "Cutout(size=16)",
        ],
        "loop.first_task_epochs": 200,
        "trainer.max_epochs": 170,
    },
}

SLOW = "each step runs the extractors, the task-agnostic network and its copy on two views"
TINY = {"projection_hidden": 8, "projection_size": 6, "attention_heads": 2}
SUBJECTS = {
    "TagFex": Subject(
        small(TagFex, **TINY),
        first_task_is_finetuning=False,
        reason="each step has two augmented views of an image",
    )
}
SMALL = partial(TagFex, backbone=plain_net, optimizer=sgd, memory_size=60, **TINY)


def test_transfer_is_the_divergence_from_the_merged_logits_on_the_chosen_rows():
    student, teacher = normal(4, 3, requires_grad=True), normal(4, 3, seed=1, requires_grad=True)
    rows, p, q = torch.tensor([True, False, True, False]), (student / 2).softmax(1), (teacher / 2).softmax(1)
    loss = transferred(student, teacher, rows, 2.0)
    torch.testing.assert_close(loss, (q * (q.log() - p.log())).sum(1)[rows].sum())
    gradient, other = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    torch.testing.assert_close(gradient, (p - q) / 2 * rows[:, None])
    assert other is None
    assert transferred(student, teacher, ~rows & rows, 2.0) == 0


def nce(u, v, tau):
    """As the docstring of the module, row after row; the second half are the other views of the first half."""
    count, losses = len(u), []
    for i in range(count):
        cosines = F.cosine_similarity(u[i : i + 1], v) / tau
        others = torch.cat([cosines[:i], cosines[i + 1 :]])
        losses.append(others.logsumexp(0) - cosines[(i + count // 2) % count])
    return torch.stack(losses).mean()


class Checked(TagFex):
    """Compares the first steps of the tasks with the equations."""

    def losses(self, batch, output):
        if self.task.index == 1 and 1 not in self.seen:
            with torch.no_grad():  # worse than the head
                self.merged_head.blocks[0].weight.mul_(100)
        terms = super().losses(batch, output)
        if self.task.index in self.seen:
            return terms
        agnostic, images, labels = self.agnostic, batch.images, batch.labels
        half = len(images) // 2
        assert torch.equal(labels[:half], labels[half:])
        assert not torch.equal(images[:half], images[half:])
        maps = agnostic.net.feature_map(images)  # (2B, d, h, w)
        features = maps.mean((2, 3))
        assert torch.equal(features, agnostic.net(images))
        own = agnostic.projection(features)
        k = {0: 0.0, 1: 4 / 7, 2: 7 / 10}[self.task.index]
        expected = {
            "ce": F.cross_entropy(output.logits, labels),
            "contrast": 0.7 * (1 - k) * nce(own, own, 0.2),
        }
        if self.task.index:
            known = self.task.num_seen - 3
            before = agnostic.before.module
            target = before["projection"](before["net"](images))
            u = before["projection"](agnostic.predictor.module(features))
            new, newest = labels >= known, self.backbone.extractors[-1]
            aux = (labels - known + 1).clamp(min=0)
            (block,) = self.aux_head.blocks
            merger, (last,) = self.merger.module, self.merged_head.blocks
            tokens = [net.feature_map(images).flatten(2).transpose(1, 2) for net in (newest, agnostic.net)]
            own, other = (F.layer_norm(token, (8,)) for token in tokens)
            q, k_own, v_own, k_other, v_other = (
                x @ layer.weight.T
                for x, layer in (
                    (own, merger.queries),
                    (own, merger.own_keys),
                    (own, merger.own_values),
                    (other, merger.agnostic_keys),
                    (other, merger.agnostic_values),
                )
            )
            keys, values = torch.cat([k_own, k_other], 1), torch.cat([v_own, v_other], 1)
            heads = [
                ((q[..., h] @ keys[..., h].transpose(1, 2)) / 2).softmax(2) @ values[..., h]
                for h in (slice(0, 4), slice(4, 8))
            ]
            merged = torch.cat(heads, 2).mean(1)
            m, mine = merged @ last.weight.T + last.bias, output.logits[:, known:]
            ces = [F.cross_entropy(z[new], labels[new] - known) for z in (m, mine)]
            kl = F.kl_div((mine[new] / 2).log_softmax(1), (m[new] / 2).softmax(1), reduction="batchmean")
            self.better.append(bool(ces[0] < ces[1]))
            expected |= {
                "aux": 2 * F.cross_entropy(newest(images) @ block.weight.T + block.bias, aux),
                "predict": 1.5 * k * nce(u, target, 0.2),
                "merge": 0.8 * ces[0],
                "transfer": 0.9 * kl * self.better[-1],
            }
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                terms[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
            )
        self.seen.append(self.task.index)
        return terms


def test_the_losses_match_the_paper():
    weights = {"contrast_weight": 0.7, "predict_weight": 1.5, "merge_weight": 0.8, "transfer_weight": 0.9}
    net = partial(CifarResNet, depth=8, width=2)
    strategy = Checked(backbone=net, optimizer=sgd, memory_size=60, **TINY, **weights)
    strategy.seen, strategy.better = [], []
    run(strategy, max_epochs=1, data={"batch_size": 24, "transforms": [RandomCrop(padding=1)]}, limit_train_batches=2)
    assert strategy.seen == [0, 1, 2]
    assert strategy.better == [False, True]


def test_a_new_extractor_is_near_the_last_one_and_old_logits_do_not_change():
    strategy, images = grown(TagFex, tasks=2, **TINY), normal(5, 1, 8, 8)
    with torch.no_grad():
        for value in strategy.agnostic.net.parameters():
            value.add_(0.5)
        strategy.agnostic.net.layers[2].running_mean.fill_(3.0)
    last = {name: value.clone() for name, value in strategy.backbone.extractors[1].state_dict().items()}
    before = strategy.eval().network(images)
    guide = strategy.agnostic.net.state_dict()
    begin(strategy, 2)
    strategy.double().eval()
    for name, value in strategy.backbone.extractors[2].state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.95 * last[name] + 0.05 * guide[name])
    assert_same(last, strategy.backbone.extractors[1].state_dict())
    after = strategy.network(images)
    assert not torch.equal(after.features[:, 32:], after.features[:, 16:32])
    torch.testing.assert_close(after.logits[:, :4], before.logits)
    assert strategy.network.head.blocks[-1].weight.abs().min() > 0


def test_the_agnostic_network_learns_by_contrast_alone_and_its_copies_are_frozen():
    watch, options = Watch(), {"optimizer": partial(torch.optim.SGD, lr=0.1)}
    without = TagFex(backbone=NormNet, memory_size=40, contrast_weight=0.0, predict_weight=0.0, **options, **TINY)
    run(without, watch, max_epochs=1)
    names = [name for name, _ in without.agnostic.named_parameters() if not name.startswith("predictor.")]
    for name in names:
        assert torch.equal(watch.first[0, "train"][f"agnostic.{name}"], without.agnostic.state_dict()[name])
    watch = Watch()
    strategy = run(TagFex(backbone=NormNet, memory_size=40, **options, **TINY), watch, max_epochs=1).strategy
    for task in (1, 2):
        first, last, end = watch.first[task, "train"], watch.last[task, "train"], watch.last[task - 1, "train"]
        assert_same(part(first, "agnostic.before."), part(last, "agnostic.before."))
        for kind in ("net", "projection"):
            for name, value in part(first, f"agnostic.before.module.{kind}.").items():
                assert torch.equal(value, end[name.replace("before.module.", "")])
        for prefix in ("agnostic.net.", "agnostic.projection.", "agnostic.predictor.", "merger.", "merged_head."):
            held = part(first, prefix)
            assert held
            assert all(not torch.equal(value, last[name]) for name, value in held.items())
    kept = "agnostic.predictor."
    assert_same(part(watch.last[1, "train"], kept), part(watch.first[2, "train"], kept))
    left = {name.partition(".")[0] for name in strategy.state_dict()}
    assert left == {"network", "agnostic", "memory", "task_columns"}
    assert not part(strategy.state_dict(), "agnostic.before.")
    assert strategy.bytes_kept()["task_agnostic"] == sum(v.nbytes for v in strategy.agnostic.state_dict().values())


class TwoViews(DERExpand):
    def prepare_batch(self, batch):
        return cat([batch, self.data.augment(batch.replace(draw=batch.draw.fork(0x7A6)))], 1)

    def begin_task(self, task):
        super().begin_task(task)
        for block in self.network.head.blocks[:-1]:
            block.weight.data[:, 16 * task.index :] = 0


def test_without_the_agnostic_network_it_is_der_on_two_views():
    # The head starts at 0: its random values depend on how many modules were built before it.
    common = {"head": partial(LinearHead, init_std=0.0), "aux_weight": 2.0}
    off = {"contrast_weight": 0.0, "predict_weight": 0.0, "merge_weight": 0.0, "transfer_weight": 0.0, "mix": 0.0}
    check_limit(small(TagFex, **common, **off, **TINY), small(TwoViews, **common), last_task=1)


def test_domains_without_new_classes_are_learnt_without_merging():
    made = run(SMALL(), data={"scenario": RotatedDomains(tasks=2)}, max_epochs=1)
    assert made.strategy.network.head.num_columns == 10


def test_it_forgets_less_than_fine_tuning():
    five = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 4}
    common = {"backbone": partial(MLP, hidden=(64,))}
    plain = last_accuracy(finetuning(common, **five).R_ci)
    ours = last_accuracy(run(TagFex(**common, memory_size=100, **TINY), **{**five, "max_epochs": 2}).matrix.R_ci)
    # Measured after 2 epochs: .66 against .17.
    assert ours > plain + 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"contrast_weight": -1.0},
        {"predict_weight": -1.0},
        {"merge_weight": -1.0},
        {"transfer_weight": -1.0},
        {"contrast_temperature": 0.0},
        {"transfer_temperature": 0.0},
        {"mix": 1.5},
        {"projection_hidden": 0},
        {"projection_size": 0},
        {"attention_heads": 0},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=f"TagFex: {next(iter(options))}"):
        TagFex(**options)


def test_heads_that_do_not_divide_the_features_are_refused():
    with pytest.raises(ValueError, match="TagFex: attention_heads is 3; use a divisor of the number of features, 16"):
        TagFex(backbone=plain_net, attention_heads=3).build((1, 8, 8))
