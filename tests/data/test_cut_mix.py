"""CutMix and mixup."""

import pytest
import torch
import torch.distributed as dist
from support import forks
from support.fakes import batch_of
from torch.nn import functional as F

from cl_lightning.batch import Draw, join
from cl_lightning.data import cut_box, cutmix, mixed_loss, mixup
from cl_lightning.data.cut_mix import previous
from cl_lightning.distributed import all_gather_rows, rank


def test_a_box_has_the_area_that_is_replaced_and_ends_at_the_border():
    assert cut_box(16, 8, 0.75, (0.5, 0.5)) == (slice(4, 12), slice(2, 6))  # half of each side
    assert cut_box(16, 8, 0.75, (0.0, 0.99)) == (slice(0, 4), slice(5, 8))
    assert cut_box(16, 8, 0.0, (0.5, 0.5)) == (slice(0, 16), slice(0, 8))
    rows, columns = cut_box(16, 8, 1.0, (0.5, 0.5))
    assert (rows.stop - rows.start, columns.stop - columns.start) == (0, 0)


def numbered(start, stop, total=4, key=0):
    """Rows of a batch of ``total`` images of one value each, which is also the label."""
    labels = torch.arange(start, stop)
    images = labels.float()[:, None, None, None].expand(-1, 2, 8, 8)
    return batch_of(labels, images=images).replace(draw=Draw(key, start, stop, total))


def mixed(probability, key=0, alpha=1.0):
    batch = numbered(0, 4, key=key)
    return batch, cutmix(batch, probability, alpha)


def test_mixed_images_have_a_box_of_the_previous_image_and_the_share_of_their_own_pixels():
    shares = []
    for key in range(60):
        before, after = mixed(1.0, key)
        assert torch.equal(after.labels, before.labels)
        assert after.extra["partner"].tolist() == [3, 0, 1, 2]
        own = after.images == before.images
        other = after.images == before.images.roll(1, dims=0)
        assert (own | other).all()
        share = own.double().mean(dim=(1, 2, 3))
        torch.testing.assert_close(share, after.extra["remains"].double())
        assert torch.equal(own[:, 0], own[:, 1])
        shares.append(float(share[0]))
        assert torch.equal(before.images[:, 0, 0, 0], torch.arange(4.0))
    assert len(set(shares)) > 10
    assert 0.5 < sum(shares) / 60 < 0.85  # u is uniform; boxes are cut at the border


def test_images_are_mixed_with_the_given_probability():
    assert not mixed(0.0)[1].extra
    hits = sum(bool(mixed(0.3, key)[1].extra) for key in range(300))
    assert 60 < hits < 120
    wide = [float(mixed(1.0, key, 50.0)[1].extra["remains"][0]) for key in range(40)]
    narrow = [float(mixed(1.0, key, 0.1)[1].extra["remains"][0]) for key in range(40)]
    assert torch.tensor(wide).std() < torch.tensor(narrow).std()


def test_images_are_mixed_with_the_previous_one_of_their_group():
    assert previous(torch.tensor([1, 0, 1, 2, 0, 1])).tolist() == [5, 4, 0, 3, 1, 2]
    assert previous(torch.tensor([7, 7, 7])).tolist() == [2, 0, 1]
    batch = numbered(0, 5, total=5)
    found = cutmix(batch, 1.0, 1.0, groups=torch.tensor([0, 1, 0, 0, 1]))
    assert found.extra["partner"].tolist() == [3, 4, 0, 2, 1]
    other = batch.images[found.extra["partner"]]
    assert ((found.images == batch.images) | (found.images == other)).all()
    assert (found.images != batch.images).any()


def test_mixup_is_a_weighted_mean_with_the_previous_image():
    shares = []
    for key in range(60):
        before = numbered(0, 4, key=key)
        after = mixup(before, 1.0, 0.8)
        share = after.extra["remains"]
        assert share.shape == (4,)
        own, other = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([3.0, 0.0, 1.0, 2.0])
        expected = (share * own + (1 - share) * other)[:, None, None, None].expand(-1, 2, 8, 8)
        torch.testing.assert_close(after.images, expected)
        assert after.extra["partner"].tolist() == [3, 0, 1, 2]
        assert after.labels.tolist() == [0, 1, 2, 3]
        shares.append(float(share[0]))
    assert 0.4 < sum(shares) / 60 < 0.6
    assert 0.07 < torch.tensor(shares).var() < 0.12  # Beta(0.8, 0.8): 0.096
    assert not mixup(numbered(0, 4), 0.0, 0.8).extra
    hits = sum(bool(mixup(numbered(0, 4, key=key), 0.3, 0.8).extra) for key in range(300))
    assert 60 < hits < 120


@pytest.mark.parametrize("mixing", [cutmix, mixup])
@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_of_one_image_or_none_is_mixed_with_itself(rows, mixing):
    batch = numbered(0, rows, total=rows)
    found = mixing(batch, 1.0, 1.0)
    torch.testing.assert_close(found.images, batch.images)
    assert torch.equal(found.extra["partner"], batch.labels)


def test_the_loss_weighs_both_labels_by_their_pixels():
    logits, labels, partner = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 0])
    batch = batch_of(labels).replace(extra={"partner": partner, "remains": torch.full((4,), 0.7)})
    found = mixed_loss(lambda batch: F.cross_entropy(logits, batch.labels), batch)
    torch.testing.assert_close(found, 0.7 * F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(logits, partner))
    plain = mixed_loss(lambda batch: F.cross_entropy(logits, batch.labels), batch_of(labels))
    assert torch.equal(plain, F.cross_entropy(logits, labels))


MIXINGS = (cutmix, mixup)


def _mix_in_a_pair(path):
    """7 images of the stream and 4 replayed images, unevenly split; afterwards in the order of one process."""
    dist.init_process_group("gloo")
    stream, replay = ((0, 5), (0, 1)) if rank() == 0 else ((5, 7), (1, 4))
    joint = join({"stream": numbered(*stream, total=7), "replay": numbered(*replay)})
    results = []
    for mixing in MIXINGS:
        found = mixing(joint, 1.0, 1.0)
        rows = [all_gather_rows(found.images[part]) for part, _ in joint.parts.values()]
        partners = [all_gather_rows(found.extra["partner"][part]) for part, _ in joint.parts.values()]
        results.append((torch.cat(rows), torch.cat(partners)))
    if rank() == 0:
        torch.save(results, path)


def test_two_processes_mix_the_images_of_one(tmp_path):
    forks.pair(_mix_in_a_pair, tmp_path / "two.pt")
    results = torch.load(tmp_path / "two.pt", weights_only=True)
    for mixing, (images, partners) in zip(MIXINGS, results, strict=True):
        found = mixing(join({"stream": numbered(0, 7, total=7), "replay": numbered(0, 4)}), 1.0, 1.0)
        assert torch.equal(images, found.images)
        assert torch.equal(partners, found.extra["partner"])
        assert partners.tolist() == [3, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
