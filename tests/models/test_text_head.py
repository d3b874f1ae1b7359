"""Fixed rows from the names of the classes (LingoCL)."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fakes import normal
from support.runs import loop, plain_net, run, sgd

from cl_lightning.models import MLP, LinearHead, TextHead, save_text_embeddings, template_mean
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lwf import LwF

DIGITS = [str(digit) for digit in range(10)]


def table(folder: Path, names=DIGITS, size: int = 16, **arrays) -> str:
    rows = normal(len(names), size, seed=7).numpy()
    path = folder / "embeddings.npz"
    np.savez(path, **{"clip_text512": rows, "class_names": np.array(names), **arrays})
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return table(tmp_path)


def filled(file: str, names=("3", "1"), **options) -> TextHead:
    head = TextHead(16, embeddings=file, **options).double()
    head.grow(len(names))
    head.fill_names(names)
    return head


def test_logits_are_scaled_cosines_to_the_rows_of_the_names(file):
    head, features, rows = filled(file, scale=3.0), normal(4, 16), normal(10, 16, seed=7)
    expected = torch.stack([3 * torch.cosine_similarity(features, rows[c].expand(4, 16), dim=1) for c in (3, 1)], 1)
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head.classify(5 * features), expected)
    assert isinstance(head.scale, torch.nn.Parameter)
    assert not list(filled(file, learn_scale=False).parameters())


def test_centred_rows_are_without_the_mean_of_the_table(file):
    head, rows = filled(file, center=True), normal(10, 16, seed=7)
    rows = rows - rows.mean(0)
    torch.testing.assert_close(head.weight().float(), (rows / rows.norm(dim=1, keepdim=True))[[3, 1]].float())


def test_several_templates_give_the_direction_of_the_mean_of_their_directions(tmp_path):
    embeddings = normal(10, 3, 16, seed=7) * torch.tensor([1.0, 20.0, 0.1])[:, None]
    lengths = embeddings.square().sum(2, keepdim=True).sqrt()
    mean = (embeddings / lengths).sum(1) / 3
    expected = mean / mean.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(template_mean(embeddings), expected)
    torch.testing.assert_close(template_mean(embeddings[:, [2, 0, 1]]), expected)  # in any order
    torch.testing.assert_close(template_mean(embeddings[:, :1]), (embeddings / lengths)[:, 0])
    head = filled(table(tmp_path, clip_text512=embeddings.numpy()))
    torch.testing.assert_close(head.weight().float(), expected[[3, 1]].float())
    centred = expected - expected.mean(0)
    head = filled(table(tmp_path, clip_text512=embeddings.numpy()), center=True)
    torch.testing.assert_close(head.weight().float(), torch.nn.functional.normalize(centred, dim=1)[[3, 1]].float())


def test_a_projection_can_be_asked_for_where_the_sizes_are_equal(file):
    head, features = filled(file), normal(4, 16)
    before = head(features)
    assert not hasattr(head.projection, "weight")
    linear = head.project(identity=True).double()
    torch.testing.assert_close(head(features), before)
    linear.weight.data *= torch.arange(1, 17)  # of each column
    torch.testing.assert_close(head(features), filled(file)(features * torch.arange(1, 17)))
    assert linear.bias is None
    assert not torch.equal(head.project().weight, head.project().weight)  # at random
    with pytest.raises(ValueError, match="features have 5 numbers and embeddings 16"):
        TextHead(5, embeddings=file).project(identity=True)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5)])
def test_embeddings_are_read_as_they_were_saved(tmp_path, shape):
    rows = normal(*shape)
    save_text_embeddings(tmp_path / "rows.npz", rows, ["Lawn_Mower", "can"], key="glove", names_key="labels")
    head = TextHead(5, embeddings=str(tmp_path / "rows.npz"), key="glove", names="labels")
    head.grow(2)
    head.fill_names(["can", "lawn mower"])
    expected = template_mean(rows if rows.ndim == 3 else rows[:, None])[[1, 0]]
    torch.testing.assert_close(head.weight(), expected.float())


@pytest.mark.parametrize(
    ("rows", "names", "words"),
    [
        (torch.ones(2, 3), ["a"], "they must be floats"),
        (torch.ones(2), ["a", "b"], "they must be floats"),
        (torch.ones(2, 0, 3), ["a", "b"], "they must be floats"),
        (torch.zeros(1, 2, 3), ["a"], "a row that is not finite or 0"),
        (torch.tensor([[[1.0, 2.0], [-2.0, -4.0]]]), ["a"], "templates of opposite directions"),
        (torch.ones(2, 3), ["a_b", "A B"], "several rows for the name 'a b'"),
    ],
)
def test_embeddings_that_cannot_be_used_are_not_saved(tmp_path, rows, names, words):
    with pytest.raises(ValueError, match=words):
        save_text_embeddings(tmp_path / "rows.npz", rows, names)
    assert not (tmp_path / "rows.npz").exists()


def test_features_of_another_size_are_mapped_to_the_embeddings(tmp_path):
    head = TextHead(5, embeddings=table(tmp_path)).double()
    head.grow(10)
    head.fill_names(DIGITS)
    features = normal(4, 5)
    torch.testing.assert_close(
        head(features),
        16 * torch.cosine_similarity((features @ head.projection.weight.T)[:, None], head.weight(), dim=2),
    )


def test_the_gradient_is_orthogonal_to_the_features_and_there_is_none_for_the_rows(file):
    head, features = filled(file), normal(4, 16, requires_grad=True)
    torch.nn.functional.cross_entropy(head(features), torch.tensor([0, 1, 1, 0])).backward()
    torch.testing.assert_close((features.grad * features).sum(1), torch.zeros(4).double(), atol=1e-12, rtol=0)
    assert features.grad.norm(dim=1).min() > 0
    assert head.weight().grad is None
    assert not head.weight().requires_grad


@pytest.mark.parametrize(("scale", "floor"), [(1.0, 3.622), (16.0, 1.1e-5)])
def test_the_floor_of_the_cross_entropy_of_orthonormal_rows(tmp_path, scale, floor):
    names = [f"class {c}" for c in range(100)]
    head = TextHead(100, embeddings=table(tmp_path, names, clip_text512=np.eye(100)), scale=scale).double()
    head.grow(100)
    head.fill_names(names)
    loss = torch.nn.functional.cross_entropy(head(torch.eye(100).double()), torch.arange(100))
    assert float(loss) == pytest.approx(math.log(1 + 99 * math.exp(-scale)), rel=1e-9)
    assert float(loss) == pytest.approx(floor, rel=0.02)


def test_names_are_compared_without_upper_case_and_underscores(tmp_path):
    head = filled(table(tmp_path, ["Lawn_Mower", "can"]), ("can", "lawn mower"))
    expected = torch.nn.functional.normalize(normal(2, 16, seed=7), dim=1)[[1, 0]]
    torch.testing.assert_close(head.weight().float(), expected.float())


@pytest.mark.parametrize("method", [Finetune, LwF])
def test_rows_are_the_same_through_all_tasks_and_after_loading(file, method):
    kept = []

    class Look(method):
        def end_task(self, task):
            super().end_task(task)
            kept.append(self.network.head.weight().clone())

    make = partial(Look, backbone=plain_net, head=partial(TextHead, embeddings=file), optimizer=sgd)
    made = run(make(), max_epochs=1)
    rows = torch.nn.functional.normalize(normal(10, 16, seed=7), dim=1).float()
    expected = rows[[DIGITS.index(name) for name in made.strategy.data.class_names]]
    for weight in kept:
        assert torch.equal(weight, expected[: len(weight)])
    assert made.strategy.network.head.scale != 16  # trained
    again = make()
    again.build((1, 8, 8))
    again.load_state_dict(made.strategy.state_dict())
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made.strategy.eval()
    assert torch.equal(again.eval().predict(images), made.strategy.predict(images))


def test_a_task_is_learnt_with_fixed_rows(file):
    options = {"options": {"stop_after_task": 0}, "max_epochs": 4}
    made = run(Finetune(backbone=partial(MLP, hidden=(32,)), head=partial(TextHead, embeddings=file)), **options)
    assert made.matrix.R_ci[0, 0] > 0.9


def test_a_class_without_a_row_is_an_error_before_training(tmp_path):
    made = loop(Finetune(backbone=plain_net, head=partial(TextHead, embeddings=table(tmp_path, DIGITS[:8]))))
    with pytest.raises(ValueError, match="no row for the class '8'"):
        made.fit()


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ({}, {"key": "glove"}, "has no 'glove'; it has class_names, clip_text512"),
        ({}, {"names": "labels"}, "has no 'labels'"),
        ({"clip_text512": np.zeros((10, 4))}, {}, "a row that is not finite or 0"),
        ({"clip_text512": np.full((10, 4), np.nan)}, {}, "a row that is not finite or 0"),
        ({"clip_text512": np.ones((9, 4))}, {}, "they must be floats"),
        ({"clip_text512": np.ones((10, 2, 2, 4))}, {}, "they must be floats"),
        ({"clip_text512": np.stack([np.ones((10, 4)), np.zeros((10, 4))], 1)}, {}, "a row that is not finite or 0"),
        ({"class_names": np.array(["a", "A", *DIGITS[:8]])}, {}, "several rows for the name 'a'"),
        ({"class_names": np.array([None] * 10)}, {}, "Object arrays cannot be loaded"),
        ({}, {"scale": 0.0}, "TextHead: scale is 0.0"),
    ],
)
def test_files_and_options_that_are_wrong(tmp_path, arrays, options, words):
    with pytest.raises(ValueError, match=words):
        TextHead(16, embeddings=table(tmp_path, **arrays), **options)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"TextHead: embeddings .*none\.npz.*give an \.npz file"):
        TextHead(16, embeddings=str(tmp_path / "none.npz"))


def test_other_heads_take_no_names():
    assert not LinearHead(4).needs_names
