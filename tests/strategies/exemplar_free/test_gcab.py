import math
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal, task_of
from support.runs import plain_net, run
from torch import nn

from cl_lightning.batch import Draw
from cl_lightning.callback import ContinualCallback
from cl_lightning.models import frozen_copy
from cl_lightning.strategies.exemplar_free.gcab import GCAB, ClassAttention, GatedClassAttention, TokenHead
from cl_lightning.testing import Subject, small

tiny = partial(GatedClassAttention, dim=8, heads=2, depth=1, local=1, patch_size=4, mlp_ratio=1.5, drop_path_rate=0.0)
adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)

SUBJECTS = {
    "GCAB": Subject(
        small(GCAB, backbone=tiny, scale=10.0, drift_weight=0.1),
        first_task_is_finetuning=False,
        reason="the loss is the binary cross-entropy, and units have gates",
    ),
}

PUBLISHED = {
    "gcab_cifar100": {
        "source": "OcraM17/GCAB-CFDC: options/model/cifar_GCAB_FDC.yaml, defaults of main.py, continual/GCAB.py",
        "backbone": "GatedClassAttention(depth=5, dim=384, drop_path_rate=0.1, heads=12, local=5, mlp_ratio=4.0, "
        "patch_size=4)",
        "gate_weight": 0.05,
        "drift_weight": 0.001,
        "scale": 800.0,
        "optimizer": "AdamW(lr=0.000125, weight_decay=1e-06)",
        "scheduler": "CosineOverPhase(final=0.08, warmup=5)",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "data.transforms": [
            "RandomCrop(padding=4)",
            "RandomHorizontalFlip()",
            "RandAugment(magnitude=9, num_magnitude_bins=11, num_ops=2)",
        ],
        "trainer.max_epochs": 500,
        "trainer.gradient_clip_val": 10000.0,
    },
}


def built(tasks=3, **options):
    """A strategy in float64 in its last of several tasks of two classes, with large random weights."""
    torch.manual_seed(0)
    strategy = GCAB(backbone=tiny, **options)
    strategy.build((1, 8, 8))
    for index in range(tasks):
        strategy.task = task_of(index)
        strategy.begin_task(strategy.task)
    with torch.no_grad():
        for parameter in strategy.network.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return strategy.double()


def norm(layer, values):
    mean, var = values.mean(-1, keepdim=True), values.var(-1, keepdim=True, unbiased=False)
    return (values - mean) / (var + 1e-5).sqrt() * layer.weight + layer.bias


def attended(block, token, patches, u, v):
    """The block for one image and one head after another, from the definition."""
    x = u * norm(block.norm1, torch.cat([token, patches]))
    q, k, value = u * (block.q.weight @ x[0]), u * (x @ block.k.weight.T), x @ block.v.weight.T
    read = []
    for head in range(block.heads):
        own = slice(head * 4, head * 4 + 4)
        weight = torch.stack([(q[own] * k[n, own]).sum() / math.sqrt(4) for n in range(len(x))]).exp()
        read.append((weight / weight.sum()) @ value[:, own])
    token = token[0] + u * (block.proj.weight @ (u * torch.cat(read)) + block.proj.bias)
    inner = block.fc1.weight @ (u * norm(block.norm2, token)) + block.fc1.bias
    inner = v * inner * (1 + (inner / math.sqrt(2)).erf()) / 2  # gelu
    return token + u * (block.fc2.weight @ inner + block.fc2.bias)


def test_the_class_token_attends_between_gates():
    torch.manual_seed(0)
    block = ClassAttention(8, 2, 12).double()
    token, patches, u, v = normal(1, 1, 8), normal(3, 4, 8, seed=1), torch.rand(8).double(), torch.rand(12).double()
    expected = torch.stack([attended(block, token[0], image, u, v) for image in patches])
    torch.testing.assert_close(block(token, patches, u, v), expected, rtol=1e-12, atol=1e-12)
    nothing = block(token, patches, torch.zeros(8).double(), v)
    assert torch.equal(nothing, token[0].expand(3, -1))


def test_gates_of_earlier_tasks_are_rounded_and_those_of_the_newest_follow_the_scale():
    backbone = built(scale=30.0).backbone
    backbone.scale = 0.7
    for mode, scale in ((True, 0.7), (False, 30.0)):
        backbone.train(mode)
        for task in range(3):
            for gate, e in zip(backbone.gates(task), backbone.embeddings_of(task), strict=True):
                soft = 1 / (1 + (-scale * e).exp())
                torch.testing.assert_close(gate, soft if task == 2 else soft.round())


def test_only_predictions_project_features_from_task_to_task():
    """The newest projector comes first; each is a linear map, a norm over the whole map, a ReLU and a linear map."""
    strategy = built()
    backbone, head, images = strategy.backbone, strategy.network.head, normal(5, 1, 8, 8)

    def back(features, number):
        layer = backbone.projectors[number]
        inner = features @ layer.inner.weight.T + layer.inner.bias
        mean, var = inner.mean((1, 2), keepdim=True), inner.var((1, 2), keepdim=True, unbiased=False)
        inner = (inner - mean) / (var + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
        return inner.clamp(min=0) @ layer.outer.weight.T + layer.outer.bias

    newest = backbone.patch_features(images)
    of_second = back(newest, 1)
    for mode, features in ((True, [newest] * 3), (False, [back(of_second, 0), of_second, newest])):
        strategy.train(mode)
        scores = []
        for task, block in enumerate(head.blocks):
            token = backbone.attention(backbone.tokens[task], features[task], *backbone.gates(task))
            scores.append(norm(block.norm, token) @ block.weight.T + block.bias)
        torch.testing.assert_close(strategy.network(images).logits, torch.cat(scores, 1), rtol=1e-11, atol=1e-11)
    assert strategy.network(images).features.shape == (5, backbone.num_features) == (5, 24)


def test_the_cascade_is_exact_where_features_have_not_moved():
    strategy = built()
    backbone = strategy.backbone
    images, before = normal(5, 1, 8, 8), frozen_copy(backbone)
    backbone.projectors = nn.ModuleList([nn.Identity(), nn.Identity()])
    before.tokens, before.projectors = before.tokens[:1], nn.ModuleList()
    before.largest = 1e9  # its newest gates are those that have been rounded since
    strategy.eval()
    assert torch.equal(strategy.network(images).features[:, :8], before(images))


def test_patches_are_embedded_with_their_position():
    backbone = built().backbone
    images = normal(2, 1, 8, 8)
    with torch.no_grad():
        for block in backbone.blocks:
            for branch in (block.attn.proj, block.mlp.fc2):
                branch.weight.zero_(), branch.bias.zero_()
    features = backbone.patch_features(images)
    kernel = backbone.embed.weight.flatten(1)
    for place, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        patch = images[:, :, row : row + 4, column : column + 4].flatten(1)
        expected = patch @ kernel.T + backbone.embed.bias + backbone.position[0, place]
        torch.testing.assert_close(features[:, place], expected)


def test_the_terms_of_the_loss():
    strategy = built(gate_weight=0.3, drift_weight=0.2)
    backbone, network = strategy.backbone, strategy.network
    past = [(normal(size, seed=3) > 0).double() for size in backbone.sizes]
    strategy.past_masks.merge(past)
    strategy.teacher.learn_from(network)
    with torch.no_grad():
        strategy.teacher.network.backbone.position += 0.1
    strategy.train()
    backbone.scale = 1.3
    labels = torch.tensor([0, 3, 5, 5])
    batch = batch_of(labels, images=normal(4, 1, 8, 8)).replace(draw=Draw.of(4, 0))
    output = network(batch.images)
    terms = strategy.losses(batch, output)
    total = 0.0
    for row, label in zip(output.logits.tolist(), labels.tolist(), strict=True):
        for column, z in enumerate(row):
            total += math.log1p(math.exp(-z if column == label else z))
    assert float(terms["bce"]) == pytest.approx(total / 24)
    used = free = 0.0
    for e, taken in zip(backbone.embeddings_of(2), past, strict=True):
        for unit, mask in zip(e.tolist(), taken.tolist(), strict=True):
            used, free = used + (1 - mask) / (1 + math.exp(-1.3 * unit)), free + 1 - mask
    assert float(terms["gates"]) == pytest.approx(0.3 * used / free)
    gap = backbone.projectors[1](backbone.patch_features(batch.images)) - (
        strategy.teacher.network.backbone.patch_features(batch.images)
    )
    torch.testing.assert_close(terms["drift"], 0.2 * gap.square().sum().sqrt())
    wanted = torch.autograd.grad(0.2 * gap.square().sum().sqrt(), backbone.embed.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(terms["drift"], backbone.embed.weight)[0], wanted)


def test_before_training_the_loss_is_that_of_even_odds():
    torch.manual_seed(0)
    strategy = GCAB(backbone=partial(tiny, dim=32))
    strategy.build((1, 8, 8))
    strategy.task = task_of(0, size=10)
    strategy.begin_task(strategy.task)
    batch = batch_of(torch.arange(10), images=normal(10, 1, 8, 8).float())
    terms = strategy.losses(batch, strategy.network(batch.images))
    assert float(terms["bce"]) == pytest.approx(math.log(2), abs=0.1)
    assert 0 < float(terms["gates"]) < 0.05
    assert terms.keys() == {"bce", "gates"}


def test_weights_between_two_used_units_are_held():
    block = ClassAttention(4, 2, 3)
    past = [torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])]
    trained = block.trained(past)
    u, v = (mask.bool().tolist() for mask in past)
    ends = {"q": (u, u), "k": (u, u), "v": (u, u), "proj": (u, u), "fc1": (v, u), "fc2": (u, v)}
    for name, (outputs, inputs) in ends.items():
        assert trained.pop(f"{name}.weight").tolist() == [[not (o and i) for i in inputs] for o in outputs]
        if name not in "qkv":
            assert trained.pop(f"{name}.bias").tolist() == [not o for o in outputs]
    assert not trained


class Look(ContinualCallback):
    """State and class tokens for fixed patch features after each task."""

    def __init__(self):
        self.states, self.tokens, self.teachers = [], [], []
        self.patches = normal(6, 4, 8).float()

    def on_task_start(self, trainer, strategy, task):
        teacher = strategy.teacher.network
        self.teachers.append(None if teacher is None else frozen_copy(teacher).state_dict())

    def on_task_end(self, trainer, strategy, task):
        backbone = strategy.backbone
        self.states.append({name: value.clone() for name, value in strategy.network.state_dict().items()})
        with torch.no_grad():
            gates = [[(e > 0).float() for e in backbone.embeddings_of(known)] for known in range(task.index + 1)]
            self.tokens.append([backbone.attention(backbone.tokens[c], self.patches, *g) for c, g in enumerate(gates)])


@pytest.fixture(scope="module")
def learnt():
    look, scales = Look(), []

    class Watched(GCAB):
        def losses(self, batch, output):
            scales.append(self.backbone.scale)
            return super().losses(batch, output)

    made = run(Watched(backbone=tiny, optimizer=adamw, scale=20.0), look, max_epochs=1)
    return made.strategy, look, scales


def test_tokens_of_earlier_tasks_stay_for_the_same_features(learnt):
    """Although AdamW moves weights without a gradient, by weight decay and by its moments."""
    _, look, _ = learnt
    for task in range(3):
        for later in look.tokens[task:]:
            assert torch.equal(later[task], look.tokens[task][task])


def test_what_belongs_to_earlier_tasks_and_all_norms_are_frozen(learnt):
    _, look, _ = learnt
    second, third = look.states[1:]
    same = {name for name, value in second.items() if torch.equal(value, third[name])}
    backbone = {name.removeprefix("backbone.") for name in same if name.startswith("backbone.")}
    expected = {f"attention.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    expected |= {f"blocks.0.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    expected |= {f"{part}.{task}" for task in (0, 1) for part in ("tokens", "embeddings.{}.0", "embeddings.{}.1")}
    expected = {name.format(name[-1])[: -2 if "embeddings" in name else None] for name in expected}
    expected |= {name for name in backbone if name.startswith("projectors.0")}
    # Where a head attends by position, a bias that all patches share has no effect.
    assert backbone - {"blocks.0.attn.pos_proj.bias"} == expected
    assert sum(name.startswith("projectors.0") for name in backbone) == 6
    head = {name.removeprefix("head.blocks.") for name in same if name.startswith("head.")}
    assert head == {f"{task}.{kind}" for task in (0, 1) for kind in ("weight", "bias", "norm.weight", "norm.bias")}
    assert torch.equal(third["head.blocks.2.norm.weight"], torch.ones(8))
    assert not torch.equal(third["head.blocks.0.norm.weight"], torch.ones(8))  # learnt in the first task


def test_units_of_all_tasks_are_marked_and_the_teacher_is_the_network_before(learnt):
    strategy, look, _ = learnt
    for place, mask in enumerate(strategy.past_masks.masks()):
        used = torch.stack([strategy.backbone.embeddings_of(task)[place] > 0 for task in range(3)]).any(dim=0)
        assert mask.tolist() == used.float().tolist()
    assert look.teachers[0] is None
    for teacher, state in zip(look.teachers[1:], look.states, strict=False):
        assert all(torch.equal(teacher[name], value) for name, value in state.items())


def test_the_scale_rises_with_the_batches_before(learnt):
    _, _, scales = learnt
    first = scales[: next(i for i, s in enumerate(scales) if i and s < scales[i - 1])]
    assert len(first) > 5
    assert first == pytest.approx([1 / 20 + (20 - 1 / 20) * b / len(first) for b in range(len(first))])


def test_gradients_of_gates_are_compensated_and_embeddings_clamped():
    strategy = built(scale=40.0)
    strategy.backbone.scale = 0.5
    for value, place in ((0.4, 0), (-1.2, 1)):
        e = strategy.backbone.embeddings_of(2)[place]
        with torch.no_grad():
            e.fill_(value)
        e.grad = torch.full_like(e, 0.5 * math.exp(-0.5 * value) / (1 + math.exp(-0.5 * value)) ** 2)
    old = strategy.backbone.embeddings_of(1)[0]
    old.grad = torch.ones_like(old)
    strategy.edit_gradients(batch_of(torch.tensor([4])))
    for value, place in ((0.4, 0), (-1.2, 1)):
        sigmoid = 1 / (1 + math.exp(-value))
        e = strategy.backbone.embeddings_of(2)[place]
        torch.testing.assert_close(e.grad, torch.full_like(e, 40 * sigmoid * (1 - sigmoid)))
        with torch.no_grad():
            e.fill_(7.0)
    assert torch.equal(old.grad, torch.ones_like(old))
    with torch.no_grad():
        strategy.after_step(batch_of(torch.tensor([4])))
    assert all(e.eq(6).all() for e in strategy.backbone.embeddings_of(2))


def test_branches_are_skipped_more_often_in_later_blocks():
    backbone = GatedClassAttention((1, 8, 8), dim=8, heads=2, depth=4, local=2, patch_size=4, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in backbone.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15])
    assert backbone.attention.drop_path.p == 0.2
    assert GatedClassAttention((1, 8, 8), dim=8, heads=2).attention.drop_path.p == 0.1
    assert [block.use_gpsa for block in backbone.blocks] == [True, True, False, False]
    block = backbone.attention.train()
    token, patches, ones = torch.zeros(1, 1, 8), torch.randn(400, 4, 8), [torch.ones(8), torch.ones(32)]
    with torch.no_grad():
        block.proj.bias += 5
        block.fc2.weight.zero_()
        skipped = block(token, patches, *ones).eq(0).all(dim=1).float().mean()
    assert 0.1 < skipped < 0.3


def test_it_forgets_less_than_finetuning_and_than_without_projectors():
    common = {
        "backbone": partial(GatedClassAttention, dim=32, heads=4, depth=1, local=1, patch_size=4, drop_path_rate=0.0),
        "optimizer": partial(torch.optim.AdamW, lr=6e-3, weight_decay=1e-6),
        "scale": 50.0,
    }
    options = {"data": {"batch_size": 32}, "max_epochs": 4, "options": {"stop_after_task": 1}}
    gcab, plain = (run(GCAB(**common, drift_weight=weight), **options).matrix for weight in (0.2, 0.0))
    finetune = finetuning({"backbone": plain_net}, **options)
    # Measured: .69 against .50; of the first task with its classes known .98 against .30.
    assert gcab.R_ci[1].mean() > finetune.R_ci[1].mean() + 0.1
    assert gcab.R_ti[1, 0] > plain.R_ti[1, 0] + 0.2


def test_other_backbones_are_refused():
    with pytest.raises(ValueError, match="GCAB: backbone is MLP; use GatedClassAttention"):
        GCAB(backbone=plain_net).build((1, 8, 8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 8, "heads": 3}, "dim is 8, heads is 3; use a divisor of dim"),
        ({"patch_size": 3}, "patch_size is 3 with images of 8 x 8 pixels; use a divisor of 8 and 8"),
        ({"depth": 2, "local": 3}, r"local is 3; it must be in \[0, 2\]"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0; it must be"),
    ],
)
def test_networks_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=f"GatedClassAttention: {said}"):
        GatedClassAttention((1, 8, 8), **{"dim": 8, "heads": 2, "local": 1, "patch_size": 4} | options)


def test_only_heads_that_attend_by_position_need_square_images():
    with pytest.raises(ValueError, match="local is 1 with images of 8 x 4 pixels; use square images, or local 0"):
        GatedClassAttention((1, 8, 4), dim=8, heads=2, depth=1, local=1)
    backbone = GatedClassAttention((1, 8, 4), dim=8, heads=2, depth=1, local=0)
    assert backbone.patch_features(torch.zeros(1, 1, 8, 4)).shape == (1, 2, 8)


@pytest.mark.parametrize("options", [{"scale": 1.0}, {"gate_weight": -1.0}, {"drift_weight": -0.1}])
def test_options_outside_their_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"GCAB: {name} is {value}; it must be"):
        GCAB(**options)


def test_a_head_without_tokens_has_the_size_of_one():
    head = TokenHead(8)
    assert head.num_features == 8
    head.grow(2)
    head.grow(3)
    assert head.num_features == 16
    other = TokenHead(8)
    other.load_state_dict(head.state_dict())
    assert other.num_features == 16
