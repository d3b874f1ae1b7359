from functools import partial

import pytest
import torch
from support.pretrained import PretrainedViT, TinyViT, tiny_transformer
from support.runs import loop, run
from support.text import digit_rows, digits_file
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import LinearHead, TextHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.pretrained.s_liprompts import DomainTextHead, SLiPrompts
from cl_lightning.stream import RotatedDomains
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "SLiPrompts": Subject(
        small(
            SLiPrompts,
            backbone=tiny_transformer,
            length=2,
            centres=2,
            head=partial(TextHead, embeddings=digits_file(16), scale=10.0),
        ),
        first_task_is_finetuning=False,
        reason="prompts and residuals are trained, on a frozen backbone",
    ),
}
SLOW = "each prediction runs a transformer twice"

adam = partial(torch.optim.Adam, lr=0.03)
TURNED = {"scenario": RotatedDomains(degrees=[0.0, 90.0, 180.0], share="split"), "batch_size": 64}
IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def text_head(size=16, **options):
    return partial(TextHead, embeddings=digits_file(size), **{"scale": 10.0, **options})


SMALL = partial(SLiPrompts, backbone=TinyViT, length=2, centres=3, optimizer=adam, head=text_head())


def learnt(tasks, **options):
    made = loop(SMALL(**options), data=TURNED, options={"stop_after_task": tasks - 1}, max_epochs=1)
    made.fit()
    return made


@pytest.mark.parametrize("size", [5, 16])
def test_logits_are_cosines_to_the_text_of_the_domain_of_each_sample(size):
    torch.manual_seed(0)
    head = DomainTextHead(text_head(16, scale=3.0)(size)).double()
    head.add_domain([0, 1], 2)
    head.add_domain([2, 0], 3)
    head.fill_names(["4", "7", "2"])
    head.double()
    features = torch.randn(4, size, dtype=torch.float64)
    with torch.no_grad():
        for block in head.blocks:
            block.weight.normal_()
    rows = F.normalize(digit_rows(16)[[4, 7, 2]], dim=1)
    projected = features if size == 16 else features @ head.text.projection.weight.T
    first, second = (block.weight for block in head.blocks)
    logits = head(features, torch.tensor([0, 1, 1, 0]))
    for sample, domain in enumerate([0, 1, 1, 0]):
        places = {0: {0: first[0], 1: first[1]}, 1: {2: second[0], 0: second[1]}}[domain]
        for column in range(3):
            if column not in places:
                assert logits[sample, column] == -torch.inf
                continue
            cosine = F.cosine_similarity(projected[sample], rows[column] + places[column], dim=0)
            torch.testing.assert_close(logits[sample, column], 3 * cosine, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head(features), head(features, torch.ones(4, dtype=torch.int64)))


def test_before_it_is_trained_the_text_is_the_one_of_zero_shot_classification():
    head, plain = DomainTextHead(text_head()(16)), text_head()(16)
    head.add_domain(range(4), 4)
    plain.grow(4)
    for one in (head, plain):
        one.fill_names(["3", "1", "4", "5"])
    features = torch.randn(6, 16)
    torch.testing.assert_close(head(features), plain(features))


def test_domains_do_not_change_each_other_and_the_projection_is_trained_in_the_first_one():
    made = learnt(1)
    strategy = made.strategy
    before = {name: value.clone() for name, value in strategy.state_dict().items()}
    assert strategy.network.head.blocks[0].weight.any()
    assert float(strategy.network.head.text.scale) != 10.0
    known = torch.zeros(7, dtype=torch.int64)
    with torch.no_grad():
        scores = strategy.eval().predict(IMAGES, known)
    for task in made.stream.tasks[1:]:
        made._run_task(task, None)
    state = made.strategy.state_dict()
    grown = ("network.backbone.prompts.centres", "network.head.position")
    for name, value in before.items():
        if "network." in name:
            assert torch.equal(state[name][:1] if name in grown else state[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(made.strategy.eval().predict(IMAGES, known), scores)
    assert [block.weight.any().item() for block in made.strategy.network.head.blocks] == [True] * 3


def test_the_loss_is_over_the_classes_of_the_domain():
    strategy = learnt(2).strategy.train()
    batch = next(iter(strategy.passes.batches(samples=8)))
    output = strategy.network(batch.images)
    head = strategy.network.head
    directions = F.normalize(head.text.embed(output.features), dim=1)
    rows = F.normalize(head.text.weight() + head.blocks[1].weight, dim=1)
    expected = F.cross_entropy(head.text.scale * directions @ rows.T, batch.labels)
    torch.testing.assert_close(strategy.losses(batch, output)["ce"], expected)


def test_it_learns_domains_better_than_a_head_of_fixed_text_on_the_same_features():
    options = {"data": TURNED, "max_epochs": 2}
    made = run(SMALL(backbone=PretrainedViT), **options)
    plain = run(Finetune(backbone=PretrainedViT, freeze_backbone=True, optimizer=adam, head=text_head()), **options)
    # Measured: .56 against .41.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.matrix.R_ci) + 0.1


def test_another_head_is_refused():
    for head in (None, LinearHead):
        with pytest.raises(ValueError, match="SLiPrompts: head is LinearHead; use a TextHead"):
            SLiPrompts(backbone=TinyViT, head=head).build((1, 8, 8))
