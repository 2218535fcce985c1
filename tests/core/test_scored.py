"""Lattices of scored pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.contract import MAX_POINTS, Dims
from m3ad.errors import ArtifactError, FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.methods import METHODS, contract_of
from m3ad.preprocess import prepare
from m3ad.scored import Lattice, lattice_of, on_lattice

LATTICES = st.one_of(st.sampled_from(["all", "half"]), st.integers(2, 8))
GRID = np.arange(MAX_POINTS, dtype=np.int32)


@settings(deadline=None, max_examples=30)
@given(LATTICES, st.integers(0, 2**32 - 1))
def test_a_lattice_keeps_the_order_and_asks_each_pixel_alone(lattice: Lattice, seed: int) -> None:
    pixels = np.flatnonzero(np.random.default_rng(seed).random(MAX_POINTS) < 0.3).astype(np.int32)
    found = on_lattice(pixels, lattice)
    np.testing.assert_array_equal(found, np.intersect1d(pixels, on_lattice(GRID, lattice)))
    assert found.dtype == np.int32


@pytest.mark.parametrize(("lattice", "share"), [("all", 1), ("half", 2), (2, 4), (4, 16), (8, 64)])
def test_a_lattice_is_regular(lattice: Lattice, share: int) -> None:
    on = np.zeros(MAX_POINTS, np.bool_)
    on[on_lattice(GRID, lattice)] = True
    assert on.sum() * share == MAX_POINTS
    tile = on.reshape(28, 8, 28, 8).sum(axis=(1, 3))
    assert (tile == 64 // share).all()


@pytest.mark.parametrize(("text", "lattice"), [("all", "all"), ("half", "half"), ("3", 3)])
def test_a_lattice_is_read(text: str, lattice: Lattice) -> None:
    assert lattice_of(text) == lattice


@pytest.mark.parametrize("text", ["", "1", "9", "-2", "quarter", "2.5"])
def test_what_is_no_lattice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"lattice must be all, half or 2\.\.8, got"):
        lattice_of(text)


def test_a_record_without_a_lattice_means_all_pixels() -> None:
    record = {k: v for k, v in Preprocessing().to_json().items() if k != "lattice"}
    assert Preprocessing.from_json(record).lattice == "all"
    assert Preprocessing.from_json({**record, "lattice": 3}).lattice == 3
    for odd in (1, "quarter", 2.5, None, True):
        with pytest.raises(ArtifactError, match="the record of preprocessing settings"):
            Preprocessing.from_json({**record, "lattice": odd})


@pytest.mark.parametrize("lattice", ["half", 2, 3])
def test_prepare_scores_the_lattice(lattice: Lattice) -> None:
    xyz = np.zeros((224, 224, 3), np.float32)
    xyz[60:160, 50:170] = (0.1, 0.1, 0.4)
    frame = Frame(np.zeros((224, 224, 3), np.uint8), xyz, "part")
    every, some = (prepare(frame, Preprocessing(lattice=each)) for each in ("all", lattice))
    np.testing.assert_array_equal(some.scored_pixel, on_lattice(every.scored_pixel, lattice))
    for name in ("image", "points", "point_pixel"):
        np.testing.assert_array_equal(getattr(some, name), getattr(every, name))


def test_a_part_that_the_lattice_misses_is_refused() -> None:
    xyz = np.zeros((224, 224, 3), np.float32)
    xyz[:, [0, 8, 16, 24, 32]] = (0.1, 0.1, 0.4)  # reach three columns to either side
    frame = Frame(np.zeros((224, 224, 3), np.uint8), xyz, "comb")
    reached = prepare(frame, Preprocessing()).scored_pixel % 224
    assert not (reached % 8 == 4).any()
    with pytest.raises(FrameError, match=r"frame comb: no pixel of the part lies on the lattice 8; .* finer"):
        prepare(frame, Preprocessing(lattice=8))


@pytest.mark.parametrize("name", ["mentor3ad", "cfm"])
def test_the_vote_of_a_lattice_takes_the_foreground(name: str) -> None:
    full, some = contract_of(name, Dims()), contract_of(name, Dims(), "half")
    assert full.stages == METHODS[name].stages(full.dims)
    assert some.inputs == full.inputs
    for stage in full.stages.values():
        added = [t.name for t in some.stages[stage.name].inputs if t not in stage.inputs]
        makes_map = "anomaly_map" in {t.name for t in stage.outputs}
        assert added == (["point_pixel"] if makes_map and stage.name != "head" else [])
    assert some.steps("chain")[-1].inputs["point_pixel"] == "point_pixel"


def test_a_method_that_reads_every_row_takes_no_lattice() -> None:
    with pytest.raises(ArtifactError, match="CMDR-IAD scores every pixel, so its lattice must be all, got 2"):
        contract_of("cmdr_iad", Dims(), 2)
