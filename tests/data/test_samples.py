import numpy as np
import pytest
import torch
from support.fakes import normal

from cl_lightning.batch import Draw
from cl_lightning.data import ArraySource
from cl_lightning.data.samples import KINDS, as_samples, kind_of
from cl_lightning.data.scaling import measured
from cl_lightning.data.standardize import Standardize, Unchanged

DRAW = Draw.of(4, 0)


@pytest.mark.parametrize(
    ("shape", "kind", "kept"),
    [
        ((4, 7), "vector", (7,)),
        ((4, 3, 7), "sequence", (3, 7)),
        ((4, 7), "sequence", (1, 7)),
        ((4, 3, 5, 7), "image", (3, 5, 7)),
        ((4, 5, 7), "image", (1, 5, 7)),
        ((4, 7), "tokens", (7,)),
    ],
)
@pytest.mark.parametrize("as_array", [False, True])
def test_samples_keep_their_shape_and_are_stored_in_one_type(shape, kind, kept, as_array):
    values = torch.arange(np.prod(shape)).view(shape)
    values = values.to(torch.int32) if kind == "tokens" else values.double() / 3
    source = ArraySource(values.numpy() if as_array else values, [0, 1, 1, 0], kind=kind)
    assert (source.kind, source.image_shape, len(source)) == (kind, kept, 4)
    rows = source.take(torch.tensor([3, 0]))
    assert rows.dtype == (torch.int64 if kind == "tokens" else torch.float32)
    torch.testing.assert_close(rows, values[[3, 0]].reshape(2, *kept).to(rows.dtype))
    assert source.largest == (values.max() if kind == "tokens" else None)
    assert source.digest(np.array([1])) != source.digest(np.array([2]))
    assert source.take(torch.zeros(0, dtype=torch.int64)).shape == (0, *kept)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (torch.zeros(4, 2, 3), "vector", r"mine: samples have shape \(4, 2, 3\); vector needs \(N, D,\)"),
        (torch.zeros(4), "vector", r"vector needs \(N, D,\)"),
        (torch.zeros(4, 0), "vector", "vector needs"),
        (torch.zeros(4, 2, 3, 3, 3), "image", r"image needs \(N, C, H, W\)"),
        (torch.zeros(4, 7), "tokens", "tokens are float32"),
        (torch.full((4, 7), -1), "tokens", "give integers from 0"),
        (torch.zeros(4, 7, dtype=torch.complex64), "vector", "real and imaginary parts as channels"),
        (np.array([["a"]] * 4), "vector", "samples are no numbers"),
    ],
)
def test_samples_that_are_not_of_their_kind_are_refused(values, kind, message):
    with pytest.raises(ValueError, match=message):
        as_samples(values, kind, "mine")


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_their_row(broken):
    values = torch.zeros(4, 7)
    values[2, 3] = broken
    with pytest.raises(ValueError, match="first in row 2, in 1 of 4 rows; fill them or leave the rows out"):
        as_samples(values, "vector", "mine")


def test_only_floating_point_rows_have_one_reading():
    assert kind_of(torch.zeros(4, 7)) == kind_of(np.zeros((4, 7), np.float64)) == "vector"
    assert kind_of(torch.zeros(4, 7).long()) is None
    assert kind_of(np.zeros((4, 7, 7), np.float32)) is None
    with pytest.raises(ValueError, match="kind is 'table'; use 'image', 'vector', 'sequence' or 'tokens'"):
        ArraySource(torch.zeros(4, 7), [0] * 4, kind="table")  # type: ignore[arg-type]
    assert len(KINDS) == 4


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 3, 3)])
def test_standardisation_is_per_feature_or_channel(shape):
    values = normal(4, *shape)
    found = Standardize([1.0, -2.0], [2.0, 0.5])(values, DRAW)
    torch.testing.assert_close(found[:, 0], (values[:, 0] - 1) / 2)
    torch.testing.assert_close(found[:, 1], (values[:, 1] + 2) / 0.5)
    torch.testing.assert_close(Standardize([3.0], [4.0])(values, DRAW), (values - 3) / 4)
    assert Unchanged()(values, DRAW) is values


def test_statistics_that_cannot_be_are_refused():
    for mean, std in (([0.0], [0.0]), ([0.0, 1.0], [1.0]), ([], [])):
        with pytest.raises(ValueError, match="std above 0"):
            Standardize(mean, std)


def test_mean_and_standard_deviation_are_measured_in_the_unit_of_the_data():
    values = torch.cat([normal(50, 1) * 3 + 1e4, torch.full((50, 1), 7.0).double(), normal(50, 1, seed=1) / 1e3], dim=1)
    source = ArraySource(values, [0] * 50, kind="vector")
    rows = torch.arange(10, 40)
    mean, std = measured(source, rows)
    expected = values[rows].float().double()
    assert mean == pytest.approx(expected.mean(0).tolist(), rel=1e-5)
    assert std == pytest.approx(
        [float(expected[:, 0].std(correction=0)), 1.0, float(expected[:, 2].std(correction=0))], rel=1e-3
    )
    sequence = ArraySource(normal(6, 2, 9), [0] * 6, kind="sequence")
    by_channel = sequence.samples.double().transpose(0, 1).flatten(1)
    assert measured(sequence, torch.arange(6))[0] == pytest.approx(by_channel.mean(1).tolist(), rel=1e-4)
