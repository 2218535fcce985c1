"""Maps of a lattice of scored pixels beside those of all of them."""

import numpy as np
import pytest
import torch
from m3ad.scored import Lattice, on_lattice, scored_pixels
from m3ad_export.heads.coverage import Coverage, on_grid
from m3ad_export.heads.map_head import ChordProduct
from m3ad_export.heads.voting import Vm, VotingConfig, fit_baseline, smooth
from token_frames import disc

LATTICES: tuple[Lattice, ...] = ("half", 2, 3, 4)
PART = disc(60, 120, 90)
EVERY = scored_pixels(PART)


def tensors(lattice: Lattice) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(on_lattice(EVERY, lattice)), torch.from_numpy(PART)


@pytest.mark.parametrize("lattice", LATTICES)
def test_constant_scores_give_the_map_of_all_pixels(lattice: Lattice) -> None:
    """To the part's edge, as far as the lattice reaches; what lies farther out is below every other value."""
    pixel, part = tensors(lattice)
    every = torch.from_numpy(EVERY)
    vm, chords = Vm(VotingConfig()), ChordProduct()
    for make, rows in ((vm.score_maps, 3), (lambda *a: chords(*a)[2], 2)):
        expected = make(torch.full((rows, len(every)), 0.3), every)
        found = make(torch.full((rows, len(pixel)), 0.3), pixel, part)
        on_part = expected[0].flatten()[every.long()].min()
        close = torch.isclose(found, expected, rtol=1e-5, atol=0)
        assert close.flatten(1)[:, EVERY].all()
        assert (close | (expected < on_part)).all()


def test_all_pixels_change_no_bit() -> None:
    pixel, part = tensors("all")
    scores = torch.rand(3, len(pixel), generator=torch.Generator().manual_seed(0))
    for head in (Vm(VotingConfig()), ChordProduct()):
        rows = scores if isinstance(head, Vm) else scores[:2]
        vote = head.voted if isinstance(head, Vm) else head
        for a, b in zip(vote(rows, pixel), vote(rows, pixel, part), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("lattice", LATTICES)
def test_coverage_is_the_ratio_of_smoothed_masks(lattice: Lattice) -> None:
    """Beside float64: box means of both masks, one divided by the other."""
    pixel, part = tensors(lattice)
    wanted, found = (
        smooth(on_grid(torch.ones(1, len(p), dtype=torch.float64), torch.from_numpy(p)))
        for p in (EVERY, on_lattice(EVERY, lattice))
    )
    expected = torch.where(found > 1e-13, wanted / found, 0.0)
    torch.testing.assert_close(Coverage()(pixel, part).double(), expected, rtol=1e-4, atol=0)


def test_a_smooth_map_is_hardly_another() -> None:
    """Scores that change over tens of pixels: a quarter of them gives the map within a hundredth."""
    y, x = np.divmod(EVERY, 224)
    scores = torch.from_numpy((1 + np.sin(x / 9) * np.cos(y / 11)).astype(np.float32))[None].repeat(2, 1)
    pixel, part = tensors(2)
    head = ChordProduct()
    full = head(scores, torch.from_numpy(EVERY))[0]
    found = head(scores[:, np.isin(EVERY, pixel)], pixel, part)[0]
    assert (found - full).abs().max() < 0.01 * full.max()


def test_the_baseline_of_a_lattice_is_that_of_the_same_scores() -> None:
    full, half = Vm(VotingConfig()), Vm(VotingConfig())
    every, part = tensors("all")
    pixel, _ = tensors("half")
    fit_baseline(full, [(torch.full((3, len(every)), 0.3), every, part)])
    fit_baseline(half, [(torch.full((3, len(pixel)), 0.3), pixel, part)])
    torch.testing.assert_close(half.baseline[:, EVERY], full.baseline[:, EVERY], rtol=1e-4, atol=0)
