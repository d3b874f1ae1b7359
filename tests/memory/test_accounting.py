import torch
from torch import nn

from cl_lightning.batch import Draw
from cl_lightning.memory import (
    GaussianPrototypes,
    Importance,
    Memory,
    PathIntegral,
    PrototypeHead,
    Prototypes,
    Teacher,
    bytes_by_kind,
    exemplars_within,
)
from cl_lightning.models import LDAHead, LinearHead, Network


def network(columns: int, head: type = LinearHead) -> Network:
    made = Network(nn.Flatten(), head(4))
    made.head.grow(columns)
    return made


class Sketch(nn.Module):
    """A user's module."""

    kept_as = "sketches"

    def num_bytes(self) -> int:
        return 7


def test_bytes_are_summed_by_kind_over_all_submodules():
    memory = Memory(4)
    memory.add(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3), torch.zeros(3).long(), Draw(0, 0, 3, 3))
    gaussian, means = GaussianPrototypes(2), Prototypes(2)
    gaussian.grow(3)
    means.grow(5)
    importance = Importance()
    importance.anchor_at({"a": torch.zeros(6)})
    teacher, path = Teacher(), PathIntegral()
    teacher.learn_from(network(2))
    path.begin({"a": torch.zeros(6)})
    solved = network(2, head=LDAHead)
    parts = [memory, gaussian, nn.Sequential(means, Sketch()), importance, teacher, path, solved, Sketch(), memory]
    assert bytes_by_kind(nn.ModuleList(parts)) == {
        "exemplars": 3 * (4 + 3 * 8),  # uint8 pixels; label, task and key of each; the memory occurs twice
        "prototypes": 3 * (2 * 4 + 8 + 4 * 4) + 5 * (2 * 4 + 8),  # a subclass counts under its base's name
        "sketches": 2 * 7,
        "importance": 4 * (6 + 1 + 1),
        "teachers": 4 * (2 * 4 + 2),
        "statistics": solved.head.num_bytes(),
    }
    assert list(bytes_by_kind(nn.ModuleList([Sketch(), Teacher()])).items()) == [("sketches", 7), ("teachers", 0)]
    assert bytes_by_kind(nn.Linear(2, 2)) == {}
    assert bytes_by_kind(means) == {"prototypes": means.num_bytes()}


def test_modules_inside_a_counted_one_are_counted_too():
    teacher = Teacher()
    teacher.learn_from(network(2, head=PrototypeHead))
    prototypes = teacher.network.head.prototypes
    assert bytes_by_kind(teacher) == {"teachers": teacher.num_bytes(), "prototypes": prototypes.num_bytes()}


def test_exemplars_take_what_parameters_leave():
    assert exemplars_within(1.0, 0, (1, 32, 32)) == 1024
    assert exemplars_within(1.0, 1, (1, 32, 32)) == 1023
    assert exemplars_within(1.0, 256, (1, 32, 32)) == 1023
    assert exemplars_within(1.0, 2**18, (3, 8, 8)) == 0
    assert exemplars_within(1.0, 2**18 + 1, (3, 8, 8)) == -1
    # one ResNet-32 in images of CIFAR
    assert exemplars_within(463_504 * 4 / 2**20, 0, (3, 32, 32)) == 603
