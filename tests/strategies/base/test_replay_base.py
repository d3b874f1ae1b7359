import pytest
import torch
from support.fakes import batch_of

from cl_lightning.batch import Draw
from cl_lightning.strategy import Replay


def arrived(labels, draw=None):
    """A batch of the stream with these labels, whose draw may be a share of a larger one."""
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return batch_of(labels, images=images).replace(draw=draw or Draw.of(len(labels), 0))


def blank(count, draw=None):
    return arrived(torch.zeros(count, dtype=torch.int64), draw)


def filled(**options):
    """A strategy whose memory holds 40 samples of 40 classes."""
    strategy = Replay(memory_size=40, **options)
    strategy.offer(arrived(torch.arange(40)))
    return strategy


@pytest.mark.parametrize(("replay_size", "drawn"), [(None, [3, 5]), (16, [6, 10])])
def test_as_many_are_drawn_as_the_global_batch_has_or_as_the_option_says(replay_size, drawn):
    strategy = filled(replay_size=replay_size)
    shares = [Draw(9, 0, 3, 8), Draw(9, 3, 8, 8)]  # two processes
    parts = [strategy.draw(blank(share.stop - share.start, share)) for share in shares]
    assert [len(part) for part in parts] == drawn
    assert parts[0].draw.total == sum(drawn)
    whole = strategy.draw(blank(8, Draw(9, 0, 8, 8)))
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_several_draws_of_a_step_differ_and_are_the_same_again():
    strategy, batch = filled(), blank(20)
    plain, first, second = (strategy.draw(batch, *salt).labels for salt in ((), (1,), (2,)))
    assert not torch.equal(plain, first)
    assert not torch.equal(first, second)
    assert torch.equal(first, strategy.draw(batch, 1).labels)
    assert Replay().draw(batch) is None


@pytest.mark.parametrize(("update_memory", "seen"), [("first", 1), ("last", 10), ("every", 111)])
def test_batches_of_the_chosen_pass_are_offered_to_the_memory(update_memory, seen):
    strategy = Replay(update_memory=update_memory)
    for count, first, last in ((1, True, False), (100, False, False), (10, False, True)):
        strategy.after_step(blank(count).replace(first_pass=first, last_pass=last))
    assert int(strategy.memory.num_seen) == seen
