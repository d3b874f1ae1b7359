from functools import partial
from typing import Any

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, stream, tiny_resnet, watching
from support.fakes import normal
from torch.nn import functional as F

from cl_lightning.losses import entropy
from cl_lightning.models import CosineHead, Output
from cl_lightning.strategies.test_time.t3a import T3A, TemplateAdjuster, most_certain
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "T3A": Subject(small(T3A, backbone=tiny_resnet, supports=2)),
}


def test_the_surest_of_each_class_are_kept_in_order():
    labels = torch.tensor([0, 1, 0, 0, 1, 2, 0])
    entropies = torch.tensor([0.5, 0.1, 0.2, 0.9, 0.1, 3.0, 0.2])
    assert most_certain(labels, entropies, 2).tolist() == [1, 2, 4, 5, 6]
    assert most_certain(labels, entropies, 1).tolist() == [1, 2, 5]  # the earlier one of equals
    assert most_certain(labels, entropies, None).tolist() == list(range(7))
    assert most_certain(labels[:0], entropies[:0], 3).tolist() == []


def by_hand(made: Any, supports: int | None) -> torch.Tensor:
    """The scores of a stream in plain loops, from the card of the method."""
    plain = source_network("source")
    weight, bias = plain.head.weight.detach(), plain.head.bias.detach()
    z = F.normalize(weight, dim=1)
    logits = weight @ weight.T + bias
    kept = [(row, int(y.argmax()), float(entropy(y[None]))) for row, y in zip(z, logits, strict=True)]
    found = []
    for images, _ in batches(made.datamodule):
        with torch.no_grad():
            output = plain(images)
        new = zip(F.normalize(output.features, dim=1), output.logits, strict=True)
        kept += [(row, int(y.argmax()), float(entropy(y[None]))) for row, y in new]
        templates = []
        for label in range(10):
            own = sorted((entry for entry in kept if entry[1] == label), key=lambda entry: entry[2])[:supports]
            templates.append(F.normalize(sum(entry[0] for entry in own) if own else z[label], dim=0))
        if supports is not None:
            kept = [
                entry
                for label in range(10)
                for entry in sorted((e for e in kept if e[1] == label), key=lambda e: e[2])[:supports]
            ]
        found.append(output.features @ torch.stack(templates).T)
    return torch.cat(found)


@pytest.mark.parametrize("supports", [1, 5, None])
def test_scores_are_those_of_plain_loops(supports):
    strategy = watching(T3A, supports=supports)
    made = adapt(strategy)
    torch.testing.assert_close(scores(strategy), by_hand(made, supports), rtol=1e-3, atol=1e-3)
    head = strategy.parts.output
    assert len(head.labels) == (10 + 400 if supports is None else len(head.labels))
    if supports is not None:
        assert int(torch.bincount(head.labels).max()) <= supports
    assert strategy.bytes_kept()["parts"] == head.num_bytes() > 0


def test_before_a_batch_a_template_is_the_direction_of_a_row_of_the_classifier():
    head, features = TemplateAdjuster(), normal(5, 3).float()
    head.weight = F.normalize(normal(4, 3, seed=1).float(), dim=1)
    head.start_labels, head.start_entropies = torch.tensor([0, 1, 1, 3]), torch.ones(4)  # row 2 is taken for class 1
    head.reset()
    both = F.normalize(head.weight[1] + head.weight[2], dim=0)
    templates = torch.stack([head.weight[0], both, head.weight[2], head.weight[3]])
    torch.testing.assert_close(head(Output(features, features)), features @ templates.T)


def test_a_reset_forgets_the_supports_and_the_order_in_a_batch_does_not_matter():
    both, alone = watching(T3A, reset="domain"), watching(T3A)
    adapt(both)
    adapt(alone, stream(corruptions=["contrast"]))
    assert torch.equal(torch.cat(both.noted[2]), torch.cat(alone.noted[1]))


def test_templates_go_with_a_method_that_trains():
    adam = partial(torch.optim.Adam, lr=0.01)
    plain, adjusted = watching(Tent, optimizer=adam), watching(Tent, optimizer=adam, output=TemplateAdjuster(5))
    adapt(plain)
    adapt(adjusted)
    assert not torch.equal(scores(plain), scores(adjusted))


def test_templates_follow_features_that_have_turned():
    """Class 0 has turned towards the border of the classifier; its surest samples show where it is."""
    head, noise, labels = TemplateAdjuster(20), normal(400, 2).float(), torch.arange(400) % 2
    head.weight, head.start_labels, head.start_entropies = torch.eye(2), torch.arange(2), torch.zeros(2)
    head.reset()
    means = 3 * torch.tensor([[0.766, 0.643], [-0.643, 0.766]])  # by 40 degrees
    features = means[labels] + 0.6 * noise
    plain = float((features.argmax(1) == labels).float().mean())
    for rows in range(0, 400, 50):
        head.learn(Output(features[rows : rows + 50], features[rows : rows + 50]))
    adjusted = float((head(Output(features, features)).argmax(1) == labels).float().mean())
    assert plain < 0.9
    assert adjusted > 0.95


def test_misuse_is_an_error():
    with pytest.raises(ValueError, match="supports is 0"):
        T3A(supports=0)
    with pytest.raises(ValueError, match=r"TemplateAdjuster: use a LinearHead, .* the head is a CosineHead"):
        T3A(head=CosineHead, backbone=tiny_resnet).build((1, 8, 8))
