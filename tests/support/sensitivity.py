"""Small networks and batches on which sensitivities are known."""

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch, Draw
from cl_lightning.models import Output


class Net(nn.Module):
    """A small network with what real ones have: convolution, normalisation, in-place activation, dropout."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> Output:
        features = self.drop(self.act(self.norm(self.conv(images)))).flatten(1)
        return Output(features, self.head(features))


class SoftmaxRegression(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Output:
        return Output(images, images @ self.weight.T)


def network() -> Net:
    torch.manual_seed(0)
    net = Net().double()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    return net.train()


def batch(images: Tensor, labels: Tensor | None = None, key: int = 0) -> Batch:
    n = len(images)
    labels = torch.zeros(n, dtype=torch.int64) if labels is None else labels
    index = torch.arange(n)
    return Batch(images, labels, torch.zeros_like(labels), index, images, Draw.of(n, key))


def batches(images: Tensor, labels: Tensor | None = None, size: int = 5) -> list[Batch]:
    return [
        batch(images[i : i + size], None if labels is None else labels[i : i + size], key=i)
        for i in range(0, len(images), size)
    ]
