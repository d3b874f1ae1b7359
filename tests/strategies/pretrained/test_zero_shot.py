from functools import partial

import pytest
import torch
from support.pretrained import PretrainedViT, TinyViT, in_tasks
from support.runs import loop, plain_net
from support.text import DIGITS, digit_rows, digits_file
from torch.nn import functional as F

from cl_lightning.models import LinearHead, TextHead, save_text_embeddings
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL
from cl_lightning.strategies.pretrained.zero_shot import ZeroShot
from cl_lightning.stream import RotatedDomains
from cl_lightning.testing import Subject, small

REASON = "nothing is trained"

SUBJECTS = {
    "ZeroShot": Subject(
        small(ZeroShot, head=partial(TextHead, embeddings=digits_file(16))),
        first_task_is_finetuning=False,
        reason=REASON,
    ),
}

PUBLISHED = {
    "zero_shot": {
        "source": "openai/CLIP: ViT-B/16, scale 100, images resized to 224 by bicubic interpolation",
        "backbone": "Timm(name=vit_base_patch16_clip_quickgelu_224.openai, pretrained=True, projection=True)",
        "head": "TextHead(embeddings=class_embeddings.npz, key=clip_text512, learn_scale=False, scale=100.0)",
        "data.resize": 224,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0.48145466, 0.4578275, 0.40821073],
        "data.std": [0.26862954, 0.26130258, 0.27577711],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.batch_size": 128,
    },
}


def zero_shot(file, **options):
    return ZeroShot(backbone=TinyViT, head=partial(TextHead, embeddings=file, **options))


def test_scores_are_scaled_cosines_to_the_rows_of_the_classes_so_far():
    made = in_tasks(partial(zero_shot, digits_file(24), scale=100.0), 5, options={"stop_after_task": 2})
    strategy, images = made.strategy.eval(), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = digit_rows(24)[[int(name) for name in strategy.data.class_names[:6]]]
    with torch.no_grad():
        features = strategy.network.backbone(images).double()
        expected = 100 * F.cosine_similarity(features[:, None], rows[None], dim=2)
        torch.testing.assert_close(strategy.predict(images).double(), expected, rtol=1e-4, atol=1e-4)


def test_accuracy_among_the_classes_of_a_task_never_changes_and_is_independent_of_the_scale():
    first, second = (in_tasks(partial(zero_shot, digits_file(24), scale=scale), 5) for scale in (100.0, 1.0))
    within = first.matrix.R_ti
    for task in range(5):
        assert (within[task:, task] == within[task, task]).all()
    torch.testing.assert_close(first.matrix.R_ci, second.matrix.R_ci, equal_nan=True)


def test_one_image_of_each_class_in_place_of_each_template_is_the_nearest_mean_of_directions(tmp_path):
    """An image tower in the space of its own features: templates are images, and e_c is a class mean of directions."""

    class Directions(PretrainedViT):
        def forward(self, images):
            return F.normalize(super().forward(images), dim=1)

    means = in_tasks(partial(SimpleCIL, backbone=Directions), 5)
    kept = means.strategy.prototypes.means[[means.strategy.data.class_names.index(name) for name in DIGITS]]
    save_text_embeddings(tmp_path / "means.npz", kept, DIGITS)
    head = partial(TextHead, embeddings=str(tmp_path / "means.npz"))
    made = in_tasks(partial(ZeroShot, backbone=PretrainedViT, head=head), 5)
    torch.testing.assert_close(made.matrix.R_ci[-1], means.matrix.R_ci[-1])
    assert made.matrix.R_ci[-1].mean() > 0.5


def test_stored_features_give_the_same_run(tmp_path):
    plain, stored = (
        in_tasks(partial(zero_shot, digits_file(24)), 5, options=options)
        for options in ({}, {"feature_cache": str(tmp_path)})
    )
    assert any(tmp_path.rglob("*"))
    torch.testing.assert_close(stored.matrix.R_ci, plain.matrix.R_ci, equal_nan=True)


def test_domains_have_the_same_rows():
    made = loop(zero_shot(digits_file(24)), data={"scenario": RotatedDomains(degrees=[0.0, 90.0])})
    made.fit()
    assert made.strategy.network.head.block_sizes() == [10]
    assert made.strategy.bytes_kept() == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "ZeroShot: head is LinearHead; use a TextHead, whose rows are embeddings of the class names"),
        ({"head": LinearHead}, "ZeroShot: head is LinearHead"),
        ({"head": partial(TextHead, embeddings=digits_file(24))}, "features have 16 numbers, embeddings 24"),
    ],
)
def test_another_head_or_features_of_another_size_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        ZeroShot(backbone=plain_net, **options).build((1, 8, 8))
