from functools import partial

import pytest
import torch
from support.pretrained import finetuning_in_tasks, in_tasks, samples_right
from support.runs import run
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP
from cl_lightning.strategies.pretrained.gacil import GACIL
from cl_lightning.stream import Blurry, ClassIncremental
from cl_lightning.testing import Subject, check_limit, check_strategy, small

SUBJECTS = {
    "GACIL": Subject(
        small(GACIL, projection=40),
        first_task_is_finetuning=False,
        reason="the head has a closed form, nothing is trained",
    ),
}

PUBLISHED = {
    "gacil": {
        "source": "Zhuang et al., NeurIPS 2024: gamma 100, 5,000 units, DeiT-S/16",
        "ridge": 100.0,
        "projection": 5000,
        "backbone": "Timm(name=deit_small_patch16_224.fb_in1k, pretrained=True)",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0.485, 0.456, 0.406],
        "data.std": [0.229, 0.224, 0.225],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "Blurry(tasks=5)",
        "data.batch_size": 128,
    },
}

random_features = partial(MLP, hidden=(64,))
SMALL = partial(GACIL, backbone=random_features, ridge=1.0, projection=200)


def learnt(scenario, **options):
    return run(SMALL(**options), data={"scenario": scenario}, max_epochs=1)


def joint(made):
    """The regression on the whole training set, at once, on ReLUs of the projected features of a run."""
    strategy, data = made.strategy, made.datamodule
    indices = torch.arange(len(data.samples(train=True).labels))
    parts = [(b.images, b.raw, b.indices) for b in strategy.passes.batches(indices=indices)]
    images, indices = torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])
    labels = torch.as_tensor(made.stream.columns_of(data.samples(train=True).labels[indices.numpy()]))
    with torch.no_grad():
        features = strategy.network.backbone(images).double()
    inputs = (features @ strategy.network.head.random.double()).clamp(min=0)
    targets = F.one_hot(labels, 10).double()
    gram = inputs.T @ inputs + torch.eye(200, dtype=torch.float64)
    return torch.linalg.solve(gram, inputs.T @ targets)


@pytest.mark.parametrize("scenario", [ClassIncremental(tasks=5), Blurry(tasks=3, disjoint=50, blurry=10)])
@pytest.mark.parametrize("backend", ["recursive", "accumulate"])
def test_it_is_the_regression_on_all_data_at_once(scenario, backend: str):
    made = learnt(scenario, backend=backend)
    weight = made.strategy.network.head.weight().T
    # Features are float32, of batches of other sizes.
    torch.testing.assert_close(weight, joint(made), rtol=1e-3, atol=1e-4)


def test_the_projection_is_the_initial_weight_of_a_linear_layer():
    torch.manual_seed(0)
    strategy = GACIL(backbone=random_features)  # 64 features
    strategy.build((1, 8, 8))
    projection = strategy.network.head.random.double()
    assert projection.shape == (64, 5000)
    assert float(projection.var()) == pytest.approx(1 / (3 * 64), rel=0.01)
    assert 0.124 < float(projection.abs().max()) <= 1 / 8


def test_the_final_accuracy_does_not_depend_on_the_split_into_tasks():
    made = [in_tasks(SMALL, count) for count in (1, 2, 5, 10)]
    assert len({samples_right(one.matrix) for one in made}) == 1
    plain = finetuning_in_tasks({"backbone": random_features}, 5, max_epochs=3)
    assert last_accuracy(made[2].matrix.R_ci) > max(0.9, last_accuracy(plain.R_ci) + 0.4)


def test_what_is_kept_is_reported():
    made = learnt(ClassIncremental(tasks=2))
    kept = made.strategy.bytes_kept()["statistics"]
    # R and W in float64, the projection of 64 features in float32, biases and counts of 10 classes, the ridge.
    assert kept == 8 * 200 * 200 + 8 * 10 * 200 + 4 * 64 * 200 + 10 * 8 * 2 + 8


def test_both_backends_predict_the_same_and_resume():
    make = small(GACIL, projection=40, backend="accumulate")
    check_strategy(make, checks=["trains", "resume", "restores", "bytes"])
    with pytest.raises(AssertionError):  # they keep other things
        check_limit(make, small(GACIL, projection=40))


@pytest.mark.parametrize(("options", "words"), [({"ridge": 0.0}, "ridge is 0"), ({"projection": 0}, "projection is 0")])
def test_options_out_of_range_are_errors(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        GACIL(**options)
