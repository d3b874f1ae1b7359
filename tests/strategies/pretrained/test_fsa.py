from functools import partial

import torch
import yaml
from support import ROOT
from support.pretrained import finetuning_in_tasks, in_tasks
from support.runs import NormNet

from cl_lightning.measures import last_accuracy
from cl_lightning.models import SSF, FiLM, LinearHead, Timm, WholeModel, gaussian_classifier
from cl_lightning.strategies.pretrained.fsa import FSA
from cl_lightning.testing import Subject, check_strategy, small

# SSF: the small net has no normalisation for FiLM. No dropout: it draws per process.
SUBJECTS = {
    "FSA": Subject(
        small(FSA, peft=SSF, session_dropout=0.0),
        first_task_is_finetuning=False,
        reason="the head is fitted in closed form when the session ends",
    ),
}

PUBLISHED = {
    "fsa": {
        "source": "aresPanos/fsa: FSA-FiLM on CIFAR-100",
        "backbone": "Timm(name=tf_efficientnet_b0.aa_in1k, pretrained=True)",
        "peft": "FiLM(targets=['bn1', 'blocks.0.*.bn1', 'blocks.[1-6].*.bn2', 'bn2'])",
        "session_dropout": 0.5,
        "session_epochs": 200,
        "optimizer": "Adam(lr=0.005)",
        "scheduler": "MultiStepLR(gamma=0.7, milestones=[50, 100, 150])",
        "data.resize": 224,
        "data.center_crop": None,
        "data.interpolation": "bicubic",
        "data.mean": [0.5],
        "data.std": [0.5],
        "data.transforms": ["RandomHorizontalFlip", "RandomVerticalFlip"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 256,
    },
}

Norm = partial(NormNet, units=64)
adam = partial(torch.optim.Adam, lr=5e-3)


def test_the_classifier_is_that_of_all_features_at_once():
    made = in_tasks(partial(FSA, backbone=Norm, optimizer=adam), 5)
    strategy = made.strategy.eval()
    head = strategy.network.head.final
    indices = torch.arange(int(head.counts.sum()))
    with torch.no_grad():
        batches = list(strategy.passes.batches(indices=indices))
        features = torch.cat([strategy.network.backbone(batch.images) for batch in batches]).double()
    raw = made.datamodule.samples(train=True).labels[torch.cat([batch.indices for batch in batches]).numpy()]
    labels = torch.as_tensor(made.stream.columns_of(raw))
    means = torch.stack([features[labels == column].mean(0) for column in range(10)])
    weight, bias = gaussian_classifier(means, features.T.cov() + torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(head(features), features @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_its_parts_match_the_paper():
    strategy = FSA(backbone=Norm)
    strategy.build((1, 8, 8))
    network = strategy.network
    assert isinstance(network.backbone.peft, FiLM)
    assert isinstance(network.head.temporary, LinearHead)
    assert (network.head.dropout.p, network.head.final.ridge, network.head.final.covariance) == (0.5, 1.0, "total")


def test_it_does_not_forget_while_fine_tuning_does():
    plain = finetuning_in_tasks({"backbone": Norm, "optimizer": adam}, 5, max_epochs=3)
    for peft in (FiLM, WholeModel):
        made = in_tasks(partial(FSA, backbone=Norm, peft=peft, optimizer=adam), 5, max_epochs=3)
        # Measured: .89 and .91 against .19.
        assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.35


def test_film_in_a_network_with_norms_passes_the_suite():
    check_strategy(small(FSA, backbone=Norm, peft=FiLM, session_dropout=0.5), checks=["trains", "resume", "restores"])


def test_the_published_config_puts_film_where_the_paper_does():
    text = (ROOT / "experiments" / "methods" / "pretrained" / "published" / "fsa.yaml").read_text(encoding="utf-8")
    targets = yaml.safe_load(text)["model"]["init_args"]["peft"]["init_args"]["targets"]
    net = Timm((3, 32, 32), name="efficientnet_b0")
    channels = [len(site.gamma) for site in FiLM(net, targets=targets).sites]
    # After the stem, in the depthwise convolution of each of the 16 blocks, after the last convolution.
    assert len(channels) == 18
    assert (channels[0], channels[1], channels[2], channels[-1]) == (32, 32, 96, 1280)
