from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cl_lightning.batch import Batch, Draw, RowDraw, cat, join, mix, mixed_rows
from cl_lightning.models import Output


def batch(start: int, stop: int, total: int, world: int) -> Batch:
    rows = torch.arange(start, stop)
    images = rows[:, None, None, None].float()
    weight = (stop - start) * world / total
    return Batch(images, rows, rows, rows, images, Draw(1, start, stop, total), weight=weight)


def test_mix_is_the_same_on_every_platform_and_depends_on_the_order():
    assert mix(0, 1, 2) == 0xF4F373571B7FEB84
    assert mix(1, 2) != mix(2, 1)
    assert len({mix(0, index) for index in range(10_000)}) == 10_000


def test_ranks_together_draw_what_one_process_draws():
    whole = Draw.of(7, 3)
    parts = [Draw(whole.key, 0, 3, 7), Draw(whole.key, 3, 3, 7), Draw(whole.key, 3, 7, 7)]
    for draw in (lambda d: d.rand(2), lambda d: d.randn(), lambda d: d.randint(9, 4)):
        assert torch.equal(torch.cat([draw(part) for part in parts]), draw(whole))


def test_numbers_of_a_draw_depend_on_its_key_and_are_distributed_as_they_say():
    draw = Draw.of(20_000, 3)
    for numbers in (lambda d: d.rand(2), lambda d: d.randn(2), lambda d: d.randint(1000, 2)):
        assert torch.equal(numbers(draw), numbers(Draw.of(20_000, 3)))
        assert not torch.equal(numbers(draw), numbers(Draw.of(20_000, 4)))
        assert not torch.equal(numbers(draw), numbers(draw.fork(0)))
    uniform, normal = draw.rand(), draw.randn()
    assert 0 <= uniform.min() < 1e-3
    assert 0.999 < uniform.max() < 1
    assert float(normal.mean()) == pytest.approx(0, abs=0.03)
    assert float(normal.var()) == pytest.approx(1, abs=0.04)
    assert float((normal.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.015)


def test_a_share_of_other_rows_covers_them_once_even_where_a_rank_has_none():
    parts = [Draw(5, 0, 0, 1), Draw(5, 0, 1, 1)]
    shares = [part.share(9, 2) for part in parts]
    assert [(share.start, share.stop) for share in shares] == [(0, 0), (0, 9)]
    assert shares[0].key == shares[1].key != parts[0].key
    uneven = [Draw(5, 0, 3, 8).share(16), Draw(5, 3, 8, 8).share(16)]
    assert [(share.start, share.stop, share.total) for share in uneven] == [(0, 6, 16), (6, 16, 16)]
    for total in range(1, 40):
        for other in range(40):  # n / total * total may be a little less than n
            assert (Draw.of(total, 5).share(other).start, Draw.of(total, 5).share(other).stop) == (0, other)


def test_the_weighted_means_of_joint_batches_are_the_mean_over_all_rows():
    # 5 samples of the stream and 3 of a memory over two processes: 2 + 1 and 3 + 2 rows.
    stream = [batch(0, 2, 5, 2), batch(2, 5, 5, 2)]
    memory = [batch(0, 1, 3, 2), batch(1, 3, 3, 2)]
    joint = [cat(pair, world_size=2) for pair in zip(stream, memory, strict=True)]
    value = sum(part.images.mean() * part.weight for part in joint) / 2
    torch.testing.assert_close(value, torch.tensor([0.0, 1, 2, 3, 4, 0, 1, 2]).mean())


def test_moving_a_batch_keeps_raw_and_images_one_tensor_where_they_are():
    one = batch(0, 2, 2, 1)
    assert one.to("cpu").raw is one.to("cpu").images
    apart = one.replace(raw=one.raw.clone())
    assert apart.to("cpu").raw is not apart.to("cpu").images
    assert Batch(one.images, one.labels, one.tasks, one.indices, one.raw, one.draw).weight == 1.0


def test_passes_are_of_the_rows_of_this_batch_and_no_other():
    one = batch(0, 4, 4, 1).replace(passes=(slice(0, 2), slice(2, 4)))
    assert one.select(slice(1, 3)).passes == one.to("cpu").passes == cat([one, one]).passes == ()


def test_numbers_of_a_row_go_with_it_wherever_it_stands():
    rows = torch.tensor([5, -(2**63), 2**63 - 1, 0, 7])
    draw, order = RowDraw.of_rows(rows, 3), torch.tensor([3, 0, 4, 1, 2])
    moved = RowDraw.of_rows(rows[order], 3)
    for one, other in ((draw, moved), (draw.fork(9), moved.fork(9))):
        assert torch.equal(one.rand(2, 3)[order], other.rand(2, 3))
        assert torch.equal(one.randn(4)[order], other.randn(4))
        assert torch.equal(one.randint(1000, 2)[order], other.randint(1000, 2))
    assert not torch.equal(draw.rand(), draw.fork(9).rand())
    assert not torch.equal(draw.rand(), RowDraw.of_rows(rows, 4).rand())


def test_numbers_of_rows_are_the_same_on_every_platform():
    draw, close = RowDraw.of_rows(torch.tensor([0, -3]), 7), {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(draw.rand(2), torch.tensor([[0.1717372, 0.0340993], [0.6565142, 0.8358587]]), **close)
    torch.testing.assert_close(draw.randn(2), torch.tensor([[-0.1240618, 0.1674938], [0.9049470, -1.7995615]]), **close)
    assert draw.randint(1000, 2).tolist() == [[171, 34], [656, 835]]
    assert (draw.start, draw.stop, draw.total) == (0, 2, 2)


def test_numbers_of_rows_are_distributed_as_they_say():
    draw = RowDraw.of_rows(torch.arange(20_000))  # neighbours
    uniform, normal, whole = draw.rand(5).double(), draw.randn(5).double(), draw.randint(7, 5)
    assert 0 <= uniform.min() < 1e-3
    assert 0.999 < uniform.max() < 1
    assert (whole.min(), whole.max()) == (0, 6)
    close = {"atol": 0.02, "rtol": 0}
    torch.testing.assert_close(uniform.mean(0), torch.full((5,), 0.5).double(), **close)
    torch.testing.assert_close(uniform.T.cov(), torch.eye(5).double() / 12, **close)
    torch.testing.assert_close(normal.mean(0), torch.zeros(5).double(), **close)
    torch.testing.assert_close(normal.T.cov(), torch.eye(5).double(), atol=0.04, rtol=0)
    torch.testing.assert_close((normal**4).mean(0), torch.full((5,), 3.0).double(), atol=0.3, rtol=0)
    torch.testing.assert_close(whole.flatten().bincount() / whole.numel(), torch.full((7,), 1 / 7), **close)
    assert draw.rand().shape == (20_000,)
    assert RowDraw.of_rows(torch.zeros(0, dtype=torch.int64)).randn(3).shape == (0, 3)


def test_a_key_of_a_row_and_numbers_has_no_twin():
    rows = torch.arange(10_000)
    keys = torch.cat([mixed_rows(rows, kind, view) for kind in range(3) for view in range(3)])
    assert len(keys.unique()) == len(keys)


class Scores(NamedTuple):
    features: Tensor
    logits: Tensor


def rows(start: int, stop: int, total: int, world: int) -> Batch:
    """Rows ``start:stop`` of ``total`` numbered samples, as one of ``world`` processes holds them."""
    numbers = torch.arange(start, stop)
    images = numbers.float().view(-1, 1, 1, 1)
    weight = world * len(numbers) / total
    return Batch(images, numbers, numbers, numbers, images, Draw(7, start, stop, total), weight=weight)


def test_a_part_of_a_joint_batch_has_its_rows_and_its_output():
    stream, replay = rows(0, 3, 3, 1), rows(10, 15, 5, 1)
    joint = join({"stream": stream, "none": None, "replay": replay})
    assert list(joint.parts) == ["stream", "replay"]
    output = Scores(joint.images.flatten(), torch.stack([joint.labels, -joint.labels], 1))
    part = joint.part("replay", output)
    assert part.batch is replay
    assert part.output.features.tolist() == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert part.output.logits[:, 1].tolist() == [-10, -11, -12, -13, -14]
    assert part.share == joint.part("stream", output).share == 1.0
    assert joint.draw == stream.draw
    with pytest.raises(ValueError, match="no part 'dark'; there are stream, replay"):
        joint.part("dark", output)
    assert joint.select(slice(0, 2)).parts == {}  # rows are others now
    assert cat([joint, stream]).parts == {}


def test_a_part_has_its_rows_of_each_tensor_of_a_tuple():
    joint = join({"stream": rows(0, 3, 3, 1), "replay": rows(10, 15, 5, 1)})
    maps = (joint.images, joint.images.expand(-1, 2, 3, 3))
    output = joint.part("replay", Output(joint.images.flatten(), joint.labels, maps)).output
    assert [tuple(part.shape) for part in output.maps] == [(5, 1, 1, 1), (5, 2, 3, 3)]
    assert output.maps[0].flatten().tolist() == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert joint.part("replay", Output(joint.images.flatten(), joint.labels)).output.maps == ()


def test_a_part_of_a_batch_without_rows_has_no_share():
    none = rows(0, 0, 4, 2)  # of a process that holds no row, in the last batch of an epoch
    assert none.weight == 0
    joint = join({"stream": none})
    assert joint.part("stream", Scores(joint.images.flatten(), joint.labels)).share == 0.0
    empty = none.replace(draw=Draw(7, 0, 0, 0))
    assert cat([empty, empty]).weight == 1.0  # no process has a row


def test_joining_counts_all_processes(monkeypatch):
    monkeypatch.setattr("cl_lightning.batch.world_size", lambda: 2)
    joint = join({"stream": rows(0, 2, 5, 2), "replay": rows(0, 2, 3, 2)})
    assert joint.weight == pytest.approx(2 * 4 / 8)
    uneven = join({"stream": rows(0, 2, 5, 2), "replay": rows(0, 1, 3, 2)})
    assert uneven.weight == pytest.approx(2 * 3 / 8)


@pytest.mark.parametrize(("stream", "replay"), [((3, 2), (5, 5)), ((4, 0), (1, 2)), ((1, 0), (0, 3))])
def test_the_mean_over_a_part_counts_as_the_mean_over_all_processes(monkeypatch, stream, replay):
    """Each process weighs the sum of its terms by ``weight``, and gradients are averaged over processes."""
    monkeypatch.setattr("cl_lightning.batch.world_size", lambda: 2)
    value = torch.arange(20, dtype=torch.float64).square() + 3
    found = 0.0
    for rank in range(2):
        parts = {}
        for name, counts, first in (("stream", stream, 0), ("replay", replay, 5)):
            start = sum(counts[:rank])
            part = rows(start, start + counts[rank], sum(counts), 2)
            parts[name] = part.replace(images=value[first + start : first + start + counts[rank]].view(-1, 1, 1, 1))
        joint = join(parts)
        if not len(joint):
            continue
        terms = 0.0
        for name in parts:
            part = joint.part(name, Scores(joint.images.flatten(), joint.labels))
            if len(part.batch):
                terms += part.share * part.output.features.mean()
        found += float(joint.weight * terms) / 2
    expected = value[: sum(stream)].mean() + value[5 : 5 + sum(replay)].mean()
    assert found == pytest.approx(float(expected), rel=1e-12)
