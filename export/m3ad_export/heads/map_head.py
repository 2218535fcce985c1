"""Rows of scores -> anomaly map: constant linear maps per axis, Y = L X L^T, and a pointwise combination of a few maps.

Every smoothing and upsampling of the methods is such a map: L is the operation on the identity in float64, kept as an
fp32 constant, so that any runtime does it with two products and no padding or resizing rule of its own. All in fp32.

References:
    CFM (Costanzino et al. 2024): chords, their product, box means, the image score's division
    CMDR-IAD: the gated mapping map and the weighted reconstruction map
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from m3ad_export.heads.axis_map import AxisMap, box, means, operator
from m3ad_export.heads.coverage import Coverage, on_grid

Resize = Literal["half_pixel", "align_corners", "bicubic"]
ImageNorm = Literal["none", "cfm"]
Smoothing = Literal["code", "figure"]
Modality = Literal["both", "rgb", "xyz"]

PIL4_TAPS = (0.4375, 1, 1, 1, 1, 1, 1, 1, 0.4375)  # over their sum, three times: PIL's GaussianBlur(4)
REC_DECAY = 0.3  # of CMDR-IAD's weights exp(-0.3 d)
WEIGHT_EPS = 1e-8


def box_pre(size: int = IMAGE_SIZE) -> Tensor:
    """Three means of 5 and two of 7: CMDR-IAD's smoothing of the RGB reconstruction error; [size, size] float64."""
    return means((5,) * 3 + (7,) * 2, size)


def gauss4(size: int = IMAGE_SIZE) -> Tensor:
    """SciPy's gaussian_filter(sigma=4): radius 16, the border mirrored with its edge; [size, size] float64."""
    return operator(lambda x: torch.from_numpy(gaussian_filter1d(x.numpy(), 4.0, axis=1)), size)


def pil4(size: int = IMAGE_SIZE) -> Tensor:
    """PIL's GaussianBlur(4) without its rounding to 8 bits, edge replicated: [size, size] float64."""
    taps = torch.tensor(PIL4_TAPS, dtype=torch.float64)
    taps = (taps / taps.sum())[None, None]

    def op(x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.conv1d(F.pad(x[:, None], (4, 4), mode="replicate"), taps)[:, 0]
        return x

    return operator(op, size)


def up(size: int, size_out: int, rule: Resize = "half_pixel") -> Tensor:
    """Linear or cubic (a = -0.75) interpolation to a finer grid: [size_out, size] float64."""
    corners = rule == "align_corners"

    def op(x: Tensor) -> Tensor:
        if rule == "bicubic":
            return F.interpolate(x[None, ..., None], (size_out, 1), mode="bicubic")[0, ..., 0]
        return F.interpolate(x[None], size_out, mode="linear", align_corners=corners)[0]

    return operator(op, size)


def chords(scores: Tensor) -> Tensor:
    """|F/|F| - F~/|F~|| of s = 1 - cos, sqrt(2 s): [K, R] -> [K, R] float32."""
    return (2 * scores.float()).sqrt()


def image_score(anomaly_map: Tensor, power: float) -> Tensor:
    """max m / (mean of m where m != 0)^power, 0 for an empty map: [224, 224] -> [1].

    The mean runs over the smoothed halo too, as in CFM. With power > 0 a part that is bad everywhere scores lower.
    """
    largest = anomaly_map.reshape(-1).amax(dim=0, keepdim=True)
    if power == 0:
        return largest
    count = (anomaly_map != 0).float().sum().clamp_min(1)
    mean = (anomaly_map.sum() / count).clamp_min(torch.finfo(torch.float32).tiny)
    return largest / mean**power


def checked_choice(name: str, value: str, choices: object) -> None:
    """Raise a ValueError when a setting is none of its Literal's values."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")


class ChordProduct(nn.Module):
    """CFM's map m = f(c_rgb c_xyz), c the chords: scores [2, R], scored_pixel [R] -> map, score [1], score_maps [3].

    The score maps are `MAPS`: each chord smoothed alone, and m itself. The map is m as it is; `image_norm` cfm divides
    the image score by sqrt(mean of m where m != 0), as CFM's tables are made. `point_pixel` [N] is given where only the
    pixels of a lattice are scored.
    """

    ROWS = ("rgb", "xyz")
    MAPS = ("rgb", "xyz", "product")

    def __init__(self, image_norm: ImageNorm = "none") -> None:
        super().__init__()
        checked_choice("image_norm", image_norm, ImageNorm)
        self.power = 0.5 if image_norm == "cfm" else 0.0
        self.smooth, self.coverage = AxisMap(box()), Coverage()

    def forward(
        self, scores: Tensor, scored_pixel: Tensor, point_pixel: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = chords(scores)
        maps = self.smooth(on_grid(torch.cat([c, c[:1] * c[1:]]), scored_pixel))
        if point_pixel is not None:
            maps = maps * self.coverage(scored_pixel, point_pixel)
        return maps[2], image_score(maps[2], self.power), maps


class GatedReconstruction(nn.Module):
    """CMDR-IAD's map: scores [K, R] of `rows`, scored_pixel [R] -> map, score [1], score_maps [M, 224, 224] of `maps`.

        j = d_map_rgb d_map_xyz,  sigma = sqrt(7x7 mean of (j - mean j)^2),  W = 4 + 2 sigma / mean sigma
        A_map = j sigmoid(W j),   A_rec = sum_k w_k d_k / sum_k w_k,  w_k = exp(-0.3 d_k),  m = f(A_map A_rec)

    d are the chords, d_rec_rgb smoothed beforehand. With one modality m is that reconstruction's error alone, the
    limit of A_rec: `rgb` f(mask x d_rec_rgb), 2D-only by our reading; `xyz` one 5x5 mean of d_rec_xyz, as in the
    authors' 3D-only code. Without a cloud every pixel is a scored one. The score maps are the d as the formula takes
    them and both A.

    Args:
        modality: whose networks there are.
        fusion_smoothing: `code` smooths like CFM; the authors' `figure` with `box_pre`, and its image score is divided
            by the mean instead of its root.
        image_norm: `cfm` divides the image score, see `image_score`.
    """

    def __init__(
        self,
        modality: Modality = "both",
        fusion_smoothing: Smoothing = "code",
        image_norm: ImageNorm = "none",
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("modality", modality, Modality),
            ("fusion_smoothing", fusion_smoothing, Smoothing),
            ("image_norm", image_norm, ImageNorm),
        ):
            checked_choice(name, value, choices)
        self.modality = modality
        figure = fusion_smoothing == "figure"
        self.power = (1.0 if figure else 0.5) if image_norm == "cfm" else 0.0
        self.smooth = AxisMap(means((5,)) if modality == "xyz" else box_pre() if figure else box())
        self.smooth_rgb = AxisMap(box_pre())
        self.mean7 = AxisMap(means((7,)))

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the K rows of scores."""
        return rows_of(self.modality)

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the M score maps."""
        return (*self.rows, "A_map", "A_rec") if self.modality == "both" else self.rows

    def forward(self, scores: Tensor, scored_pixel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask, *parts = on_grid(torch.cat([torch.ones_like(scores[:1]), chords(scores)]), scored_pixel)
        d = dict(zip(self.rows, parts, strict=True))
        if "rec_rgb" in d:
            d["rec_rgb"] = self.smooth_rgb(d["rec_rgb"][None])[0]
        if self.modality == "both":
            d["A_map"] = self.gated(d["map_rgb"] * d["map_xyz"])
            d["A_rec"] = self.weighted(d["rec_rgb"], d["rec_xyz"])
            fused = d["A_map"] * d["A_rec"] * mask
        else:
            fused = d[self.rows[0]] * mask
        anomaly_map = self.smooth(fused[None])[0]
        return anomaly_map, image_score(anomaly_map, self.power), torch.stack([d[n] for n in self.maps])

    def gated(self, joint: Tensor) -> Tensor:
        """A_map of j: [224, 224] -> [224, 224]; the means run over all pixels, scored or not."""
        sigma = self.mean7((joint - joint.mean()).square()[None])[0].sqrt()
        # Both sides of the fraction times 1024, which is exact: torch's exporter drops a sum with 1e-8, and a map of
        # one value everywhere would then be 0 / 0.
        local, mean = 1024 * sigma, 1024 * sigma.mean() + 1024 * WEIGHT_EPS
        return joint * torch.sigmoid((4 + 2 * local / mean) * joint)

    @staticmethod
    def weighted(rgb: Tensor, xyz: Tensor) -> Tensor:
        """A_rec of both reconstruction errors: the smaller one weighs more."""
        w_rgb, w_xyz = torch.exp(-REC_DECAY * rgb), torch.exp(-REC_DECAY * xyz)
        return (w_rgb * rgb + w_xyz * xyz) / (w_rgb + w_xyz + WEIGHT_EPS)


def rows_of(modality: Modality) -> tuple[str, ...]:
    """CMDR-IAD's rows of scores: of both mappings and both reconstructions, or of the one there is."""
    both = ("map_rgb", "map_xyz", "rec_rgb", "rec_xyz")
    return both if modality == "both" else (f"rec_{modality}",)
