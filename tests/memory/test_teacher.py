import pytest
import torch
from torch import nn

from cl_lightning.memory import Teacher
from cl_lightning.models import LinearHead, Network


def network(columns: int) -> Network:
    made = Network(nn.Flatten(), LinearHead(4))
    made.head.grow(columns)
    return made


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_pair_gives_the_logits_of_the_classes_that_both_know():
    student, teacher = network(3), Teacher()
    teacher.learn_from(student)
    before = student(images()).logits
    student.head.grow(2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    output = student(images())
    old, target = teacher.pair(images(), output)
    assert old.shape == target.shape == (5, 3)
    assert old.equal(output.logits[:, :3])
    assert target.equal(before)
    assert old.requires_grad
    assert not target.requires_grad


def test_an_empty_teacher_has_no_pair():
    student = network(3)
    with pytest.raises(RuntimeError, match="no teacher during the first task"):
        Teacher().pair(images(), student(images()))


def test_a_teacher_is_a_reference_only_where_it_is_said_so():
    assert not Teacher().reference
    teacher = Teacher(reference=True)
    assert teacher.reference
    assert not teacher
    teacher.learn_from(network(2))
    assert set(teacher.state_dict()) == {f"network.{name}" for name in network(2).state_dict()}


def test_a_teacher_takes_its_network_from_the_state():
    saved, other = Teacher(), Teacher()
    student = network(2)
    other.restore_network(student, {f"a.{name}": value for name, value in saved.state_dict().items()}, "a.")
    assert not other
    saved.learn_from(student)
    state = {f"a.{name}": value for name, value in saved.state_dict().items()}
    other.restore_network(network(2), state, "b.")
    assert not other  # the keys are those of another module
    other.restore_network(network(2), state, "a.")
    other.load_state_dict(saved.state_dict())
    assert other(images()).logits.equal(saved(images()).logits)
    other.restore_network(student, {}, "a.")
    assert not other


def test_a_teacher_that_adapts_normalises_by_the_batch_in_training_steps_alone():
    student = Network(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, momentum=0.25), nn.Dropout(0.9)), LinearHead(4))
    student.head.grow(3)
    owner, inputs = nn.Module(), 3 * images(6) + 1
    owner.teacher, owner.fixed = Teacher(adapts=True), Teacher()
    owner.teacher.learn_from(student.eval())
    owner.fixed.learn_from(student)
    asleep = owner.teacher(inputs).features
    torch.testing.assert_close(asleep, inputs.flatten(1) / (1 + 1e-5) ** 0.5)  # statistics 0 and 1
    owner.train()
    rows = inputs.flatten(1)
    centred = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(owner.teacher(inputs).features, centred)  # without dropout
    torch.testing.assert_close(owner.fixed(inputs).features, asleep)
    owner.eval()
    mean, var = 0.25 * rows.mean(0), 0.75 + 0.25 * rows.var(0)
    torch.testing.assert_close(owner.teacher(inputs).features, (rows - mean) / (var + 1e-5).sqrt())
    assert not any(parameter.requires_grad for parameter in owner.teacher.parameters())
