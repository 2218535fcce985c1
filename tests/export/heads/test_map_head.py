import numpy as np
import pytest
import torch
import torch.nn.functional as F
from m3ad_export.heads.axis_map import AxisMap, box, means
from m3ad_export.heads.map_head import (
    ChordProduct,
    GatedReconstruction,
    box_pre,
    gauss4,
    image_score,
    pil4,
    up,
)
from m3ad_export.heads.voting import Vm, VotingConfig, smooth
from named_weights import assert_golden
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import Tensor

SIDE = 224


def random_map(seed: int, side: int = SIDE) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((side, side)))


def sandwich(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix @ x @ matrix.T


def averaged(x: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The published chain: box filters of the two-dimensional map, zero padding."""
    for width in widths:
        kernel = torch.full((1, 1, width, width), 1 / width**2, dtype=x.dtype)
        x = F.conv2d(x[None, None], kernel, padding=width // 2)[0, 0]
    return x


@pytest.mark.parametrize(
    ("matrix", "widths"),
    [(box(), (5, 5, 5, 5, 5, 7, 7, 7)), (box_pre(), (5, 5, 5, 7, 7)), (means((5,)), (5,))],
    ids=["box", "box_pre", "box5"],
)
def test_the_box_operators_are_the_published_chains(matrix: Tensor, widths: tuple[int, ...]) -> None:
    x = random_map(1)
    torch.testing.assert_close(sandwich(matrix, x), averaged(x, widths), atol=2e-15, rtol=0)


def test_box_reaches_19_pixels_and_loses_what_lies_beyond_the_border() -> None:
    matrix = box()
    row, column = matrix.nonzero().T
    assert (row - column).abs().max() == 19
    total = matrix.sum(dim=1)
    torch.testing.assert_close(total[19:-19], torch.ones(SIDE - 38).double(), atol=1e-14, rtol=0)
    assert (total[:19] < 1).all()


def test_box_is_the_present_smoothing() -> None:
    maps = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(AxisMap(box())(maps), smooth(maps), atol=1e-6, rtol=0)


def test_gauss4_is_scipys_filter() -> None:
    x = random_map(2, 256)
    expected = gaussian_filter(x.numpy(), sigma=4)
    torch.testing.assert_close(sandwich(gauss4(256), x), torch.from_numpy(expected), atol=2e-15, rtol=0)


def test_pil4_is_pils_blur_but_for_its_eight_bits() -> None:
    """The official code truncates to 8 bits, PIL rounds: at most 1.7 levels away, half a level lower on average."""
    x = sandwich(up(28, SIDE), random_map(3, 28))
    blurred = Image.fromarray((x / x.max() * 255).numpy().astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(4)
    )
    levels = torch.from_numpy(np.asarray(blurred).astype(np.float64))
    ours = sandwich(pil4(), x) / x.max() * 255
    assert (levels - ours).abs().max() < 1.7
    assert abs(float((levels - ours).mean()) + 0.5) < 0.1
    assert spearmanr(levels.flatten(), ours.flatten()).statistic > 0.9999


@pytest.mark.parametrize(("seed_side", "side"), [(28, 224), (56, 224)])
def test_up_is_half_pixel_bilinear(seed_side: int, side: int) -> None:
    x = random_map(4, seed_side)
    expected = F.interpolate(x[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(sandwich(up(seed_side, side), x), expected, atol=2e-15, rtol=0)


@pytest.mark.parametrize("small", [16, 32, 64])
def test_up_aligns_corners(small: int) -> None:
    x = random_map(5, small)
    expected = F.interpolate(x[None, None], (256, 256), mode="bilinear", align_corners=True)[0, 0]
    torch.testing.assert_close(sandwich(up(small, 256, "align_corners"), x), expected, atol=2e-15, rtol=0)


def test_up_is_bicubic() -> None:
    x = random_map(6, 24)
    expected = F.interpolate(x[None, None], (192, 192), mode="bicubic", align_corners=False)[0, 0]
    torch.testing.assert_close(sandwich(up(24, 192, "bicubic"), x), expected, atol=4e-15, rtol=0)


def test_golden_box() -> None:
    out = AxisMap(box())(random_map(9).float()[None])
    assert_golden(out, 0.473316, 0.075544, (0.040043, 0.473917, 0.036644))


def test_golden_pil4_in_floating_point() -> None:
    out = AxisMap(pil4() @ up(56, SIDE))(random_map(9, 56).float()[None])
    assert_golden(out, 0.502296, 0.072885, (0.669688, 0.540537, 0.451908))


# --- CFM's combination


def rows(count: int, pixels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores 1 - cos [count, pixels] and ascending pixels, most of the grid left out."""
    generator = torch.Generator().manual_seed(seed)
    pixel = torch.randperm(SIDE * SIDE, generator=generator)[:pixels].sort().values
    return torch.rand(count, pixels, generator=generator), pixel


def test_cfms_map_is_twice_mentor3ads_vote_with_half_exponents() -> None:
    scores, pixel = rows(2, 9000)
    anomaly_map, _, maps = ChordProduct()(scores, pixel)
    vm = Vm(VotingConfig(exponents=((0.5, 0.5, 0),)))
    voted = vm.score_maps(torch.cat([scores, torch.ones(1, 9000)]), pixel)[-1]
    torch.testing.assert_close(anomaly_map, 2 * voted, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps[2], anomaly_map, atol=0, rtol=0)


def test_cfms_image_score_is_the_published_division() -> None:
    scores, pixel = rows(2, 9000)
    m, score, _ = ChordProduct("cfm")(scores, pixel)
    published = (m / torch.sqrt(m[m != 0].mean())).max()
    torch.testing.assert_close(score, published[None], atol=0, rtol=1e-6)
    plain = ChordProduct()(scores, pixel)
    assert plain[1].item() == m.max()
    torch.testing.assert_close(plain[0], m, atol=0, rtol=0)


def test_an_empty_map_scores_zero() -> None:
    for power in (0.0, 0.5, 1.0):
        assert image_score(torch.zeros(SIDE, SIDE), power).item() == 0


# --- CMDR-IAD's combination


def published_cmdr(d: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of the reference on maps, float64: A_map, A_rec, m."""
    d_map2d, d_map3d, d_rec2d, d_rec3d = (each.double() * mask for each in d)
    d_rec2d = averaged(d_rec2d, (5, 5, 5, 7, 7))
    j = d_map2d * d_map3d
    sigma = averaged((j - j.mean()) ** 2, (7,)).sqrt()
    gated = j / (1 + torch.exp(-(4 + 2 * sigma / (sigma.mean() + 1e-8)) * j))
    w2, w3 = torch.exp(-0.3 * d_rec2d), torch.exp(-0.3 * d_rec3d)
    weighted = (w2 * d_rec2d + w3 * d_rec3d) / (w2 + w3 + 1e-8)
    return gated, weighted, averaged(gated * weighted * mask, (5, 5, 5, 5, 5, 7, 7, 7))


def golden_chords() -> tuple[list[Tensor], Tensor, Tensor]:
    """The four seeded chords, rows of scores behind their mask, their pixels."""
    d = [random_map(seed).float() for seed in (5, 6, 7, 8)]
    pixel = torch.arange(40 * SIDE, SIDE * SIDE)
    return d, torch.stack([each.flatten()[pixel] ** 2 / 2 for each in d]), pixel


def test_golden_cmdr_fusion() -> None:
    _, scores, pixel = golden_chords()
    head = GatedReconstruction(image_norm="cfm")
    anomaly_map, score, maps = head(scores, pixel)
    a_map, a_rec = maps[head.maps.index("A_map")], maps[head.maps.index("A_rec")]
    found = torch.tensor([a_map.mean(), a_rec.mean(), anomaly_map.mean(), score.item()])
    torch.testing.assert_close(
        found, torch.tensor([0.180635, 0.399454, 0.084311, 0.434296]), atol=2e-6, rtol=0
    )


def test_cmdrs_maps_are_the_formulas_in_float64() -> None:
    d, scores, pixel = golden_chords()
    mask = torch.zeros(SIDE, SIDE).double()
    mask.view(-1)[pixel] = 1
    gated, weighted, m = published_cmdr(d, mask)
    anomaly_map, score, maps = GatedReconstruction()(scores, pixel)
    torch.testing.assert_close(maps[4].double(), gated, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps[5].double(), weighted, atol=1e-6, rtol=0)
    torch.testing.assert_close(anomaly_map.double(), m, atol=1e-6, rtol=0)
    assert score.item() == anomaly_map.max()


def test_the_figures_fusion_smooths_less_and_divides_by_the_mean() -> None:
    _, scores, pixel = golden_chords()
    code = GatedReconstruction()(scores, pixel)[2]
    m, score, maps = GatedReconstruction(fusion_smoothing="figure", image_norm="cfm")(scores, pixel)
    torch.testing.assert_close(maps, code, atol=0, rtol=0)
    expected = averaged(maps[4] * maps[5], (5, 5, 5, 7, 7))
    torch.testing.assert_close(m, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(score, (m / m[m != 0].mean()).max()[None], atol=0, rtol=1e-6)


@pytest.mark.parametrize("modality", ["rgb", "xyz"])
def test_one_modality_is_its_reconstruction_error(modality: str) -> None:
    d, scores, pixel = golden_chords()
    mask = torch.zeros(SIDE, SIDE)
    mask.view(-1)[pixel] = 1
    index = {"rgb": 2, "xyz": 3}[modality]
    head = GatedReconstruction(modality=modality)
    m, _, maps = head(scores[[index]], pixel)
    assert head.maps == (f"rec_{modality}",)
    assert len(maps) == 1
    error = d[index] * mask
    if modality == "rgb":
        expected = averaged(averaged(error, (5, 5, 5, 7, 7)) * mask, (5, 5, 5, 5, 5, 7, 7, 7))
    else:
        expected = averaged(error, (5,))
    torch.testing.assert_close(m, expected, atol=1e-6, rtol=0)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="modality must be both or rgb or xyz, got 'depth'"):
        GatedReconstruction(modality="depth")
    with pytest.raises(ValueError, match="image_norm must be none or cfm, got 'max'"):
        ChordProduct("max")
