"""VM, the voting: three score maps -> voting terms -> one map -> one-class SVM. All of it in fp32.

References:
    Mentor3AD Eq. 5 (scores), Eq. 6 (voting), Alg. 1 (one-class SVM)
    CFM, from which the smoothing comes  https://github.com/CVLAB-Unibo/crossmodal-feature-mapping
    CRD, which standardises each modality's map by good frames; `baseline` does so pixel by pixel
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from torch import Tensor, nn

from m3ad_export.heads.coverage import Coverage, on_grid
from m3ad_export.heads.mentor import unit

SCORES = ("rgb", "xyz", "mentor")
SVM_ROWS = 4096  # the exact solver is quadratic in the rows
BASELINE_FLOOR = 0.25  # of the median: keeps pixels where good parts show nothing from magnifying noise


@dataclass(frozen=True, slots=True, kw_only=True)
class VotingConfig:
    """Eq. 6's N terms and what the one-class SVM looks at.

    Args:
        exponents: alpha, beta, gamma of each term: S_RGB^alpha S_XYZ^beta S_Mtr^gamma.
        svm_input: the product S_All of the smoothed terms (its N-th root), or the vector of them.
    """

    exponents: tuple[tuple[float, float, float], ...] = ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    svm_input: Literal["product", "terms"] = "product"

    def __post_init__(self) -> None:
        table = tuple((float(a), float(b), float(c)) for a, b, c in self.exponents)  # JSON brings lists
        object.__setattr__(self, "exponents", table)
        if not table or any(min(row) < 0 or not any(row) for row in table):
            raise ValueError(f"each voting term needs exponents >= 0, one of them positive; got {table}")
        if self.svm_input not in ("product", "terms"):
            raise ValueError(f"svm_input must be product or terms, got {self.svm_input!r}")

    @property
    def svm_width(self) -> int:
        """D of the one-class SVM's input."""
        return 1 if self.svm_input == "product" else len(self.exponents)


def score(feature: Tensor, reconstructed: Tensor) -> Tensor:
    """s = 1 - cos(F, F~) = |F/|F| - F~/|F~||^2 / 2 (Eq. 5); the second form keeps small scores exact in fp32.

    [R, D], [R, D] -> [R] float32
    """
    difference = unit(feature.float()) - unit(reconstructed.float())
    return 0.5 * difference.square().sum(dim=1)


def cosine_scores(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """`score` of each pair of rows [R, ...] -> scores [n, R]; the order of SCORES is the contract's."""
    return torch.stack([score(a, b) for a, b in pairs])


def smooth(maps: Tensor) -> Tensor:
    """f: five 5x5 and three 7x7 box means with zero padding (CFM); [n, 224, 224] -> [n, 224, 224]."""
    x = maps[None]
    for _ in range(5):
        x = F.avg_pool2d(x, 5, stride=1, padding=2)
    for _ in range(3):
        x = F.avg_pool2d(x, 7, stride=1, padding=3)
    return x[0]


def term_name(exponents: tuple[float, float, float]) -> str:
    """A voting term in words: `rgb*xyz*mentor`, `rgb^0.5*xyz^0.5`."""
    return "*".join(n if e == 1 else f"{n}^{e:g}" for n, e in zip(SCORES, exponents, strict=True) if e)


class OneClassSvm(nn.Module):
    """decision = sum_k c_k k(v_k, x) - rho, k(v, x) = v.x or exp(-gamma |v - x|^2); larger is more anomalous.

    x [R, D] -> [R]
    """

    support_vectors: Tensor  # [K, D]
    coefficients: Tensor  # [K]
    rho: Tensor  # [1]

    def __init__(self, width: int, num_vectors: int = 1, kernel: Literal["linear", "rbf"] = "linear") -> None:
        super().__init__()
        self.kernel = kernel
        self.gamma = 1.0
        self.register_buffer("support_vectors", torch.ones(num_vectors, width))
        self.register_buffer("coefficients", torch.ones(num_vectors))
        self.register_buffer("rho", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == "linear":
            return x @ (self.coefficients @ self.support_vectors) - self.rho
        distance = (x[:, None] - self.support_vectors).square().sum(dim=2)  # [R, K]
        return torch.exp(-self.gamma * distance) @ self.coefficients - self.rho


class SvmRows(nn.Module):
    """What a one-class SVM sees of each pixel, divided by `unit` [1 or n]: [3 + n, 224, 224] -> [50176, 1 or n]."""

    unit: Tensor | None

    def __init__(self, config: VotingConfig, unit: Tensor | None = None) -> None:
        super().__init__()
        self.svm_input = config.svm_input
        self.register_buffer("unit", unit)

    def forward(self, score_maps: Tensor) -> Tensor:
        terms = score_maps[len(SCORES) :].flatten(1)
        if self.svm_input == "product":
            rows = terms.pow(1 / len(terms)).prod(dim=0)[:, None]
        else:
            # Not the transpose: ONNX Runtime 1.32 fuses that with a product by a vector, and wrongly.
            rows = torch.stack(terms.unbind(), dim=1)
        return rows if self.unit is None else rows / self.unit


class Vm(nn.Module):
    """Three pairs of rows and scored_pixel [R] -> anomaly_map [224, 224], score [1], score_maps [3 + n, 224, 224].

    S_All = prod_n f(S_RGB^alpha_n S_XYZ^beta_n S_Mtr^gamma_n);  O_s = w S_All^(1/N) - rho;  score = max O_s

    The root is ours: it changes no rank, and it keeps a product of six small numbers inside fp32. So is `baseline`:
    each score enters as a multiple of what good frames show at its pixel (`fit_baseline`; ones leave it as it is).
    """

    baseline: Tensor  # [3, 50176]

    def __init__(self, config: VotingConfig) -> None:
        super().__init__()
        self.config = config
        self.svm = OneClassSvm(config.svm_width)
        self.register_buffer("baseline", torch.ones(len(SCORES), IMAGE_SIZE * IMAGE_SIZE))
        self.coverage = Coverage()

    def score_maps(self, scores: Tensor, scored_pixel: Tensor, point_pixel: Tensor | None = None) -> Tensor:
        """Smoothed scores and voting terms on the grid, zero outside the scored pixels before smoothing.

        Args:
            scores: [3, R] 1 - cos, rows as in SCORES.
            scored_pixel: [R] row-major pixels.
            point_pixel: [N], where only those of a lattice are scored.

        Returns:
            [3 + n, 224, 224], in the order of `map_names`.
        """
        scores = scores / self.baseline.index_select(1, scored_pixel.long())
        products = [self._product(scores, row) for row in self.config.exponents]  # n of [R]
        maps = smooth(on_grid(torch.cat([scores, torch.stack(products)]), scored_pixel))
        return maps if point_pixel is None else maps * self.coverage(scored_pixel, point_pixel)

    @staticmethod
    def _product(scores: Tensor, exponents: tuple[float, float, float]) -> Tensor:
        factors = [s if e == 1 else s**e for s, e in zip(scores, exponents, strict=True) if e]
        return torch.stack(factors).prod(dim=0)

    def vote(self, score_maps: Tensor) -> Tensor:
        """The map of the voting terms: [3 + n, 224, 224] -> anomaly_map [224, 224]."""
        decision: Tensor = self.svm(self.svm_rows(score_maps))
        return decision.reshape(IMAGE_SIZE, IMAGE_SIZE)

    def svm_rows(self, score_maps: Tensor) -> Tensor:
        """What the one-class SVM sees of each pixel: [3 + n, 224, 224] -> [50176, 1 or n]."""
        rows: Tensor = SvmRows(self.config)(score_maps)
        return rows

    def forward(
        self,
        rgb: Tensor,
        rgb_reconstructed: Tensor,
        xyz: Tensor,
        xyz_reconstructed: Tensor,
        mentor: Tensor,
        mentor_reconstructed: Tensor,
        scored_pixel: Tensor,
        point_pixel: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pairs = ((rgb, rgb_reconstructed), (xyz, xyz_reconstructed), (mentor, mentor_reconstructed))
        return self.voted(cosine_scores(*pairs), scored_pixel, point_pixel)

    def voted(
        self, scores: Tensor, scored_pixel: Tensor, point_pixel: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [3, R] -> anomaly_map, score, score_maps."""
        score_maps = self.score_maps(scores, scored_pixel, point_pixel)
        anomaly_map = self.vote(score_maps)
        return anomaly_map, anomaly_map.reshape(-1).amax(dim=0, keepdim=True), score_maps


class HeadVote(nn.Module):
    """VM behind its scores, as the fused head uses it: scores [3, R], scored_pixel [R] -> VM's outputs."""

    def __init__(self, vm: Vm) -> None:
        super().__init__()
        self.vm = vm

    def forward(
        self, scores: Tensor, scored_pixel: Tensor, point_pixel: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.vm.voted(scores, scored_pixel, point_pixel)


def map_names(config: VotingConfig) -> tuple[str, ...]:
    """The names of score_maps: each single score, then each voting term."""
    return (*SCORES, *(f"vote {term_name(e)}" for e in config.exponents))


def fit_baseline(vm: Vm, frames: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Set what good frames score at each pixel: expected = mu + median(mu) / 4, mu = sum_i f(s_i) / sum_i f(1_i)

    A part always scores high where the encoders see it badly, at its edges above all: the same score says more in a
    calm place.

    Args:
        vm: its `baseline` is replaced.
        frames: scores [3, R], scored_pixel [R] and point_pixel [N] of each good frame.
    """
    total = torch.zeros(len(SCORES) + 1, IMAGE_SIZE, IMAGE_SIZE)
    count = 0
    for scores, scored_pixel, point_pixel in frames:
        maps = smooth(on_grid(torch.cat([scores, torch.ones_like(scores[:1])]), scored_pixel))
        total += maps * vm.coverage(scored_pixel, point_pixel)
        count += 1
    vm.baseline = expected(total, count)


def expected(total: Tensor, count: int) -> Tensor:
    """The `baseline` [3, 50176] of smoothed scores and ones, added up over `count` good frames: [4, 224, 224]."""
    covered = total[-1] > count / 2
    mean = total[:-1] / total[-1].clamp(min=1e-3)
    median = mean[:, covered].median(dim=1).values if covered.any() else mean.flatten(1).amax(dim=1)
    return (mean.flatten(1) + BASELINE_FLOOR * median[:, None]).clamp(min=torch.finfo().tiny)


def fit_one_class_svm(svm: OneClassSvm, x: Tensor, nu: float = 0.5) -> None:
    """Fit the linear one-class SVM in place: min |w|^2 / 2 - rho + mean(relu(rho - w.x)) / nu   (Alg. 1)

    The scores are >= 0, so w is too, and a larger decision is more anomalous. w and rho are then divided by sum(w): a
    positive factor moves no decision boundary, and the decision keeps the unit of the scores.

    Args:
        svm: linear, D wide.
        x: [R, D] rows of good frames, >= 0.
        nu: share of the rows left below the boundary, 0 < nu < 1.
    """
    if svm.kernel != "linear" or not 0 < nu < 1:
        raise ValueError(f"expected a linear kernel and 0 < nu < 1, got {svm.kernel} and {nu}")
    if x.shape[1] == 1:
        # Only the smallest nu R values are support vectors, all at their bound: w is their mean, rho / w their largest.
        w, rho = torch.ones(1), x[:, 0].double().quantile(nu)
    else:
        from sklearn.svm import OneClassSVM

        unit = x.mean(dim=0)  # the terms' sizes differ by orders; the solver's tolerance does not
        picked = x[torch.linspace(0, len(x) - 1, min(len(x), SVM_ROWS)).long()]
        solver = OneClassSVM(kernel="linear", nu=nu, tol=1e-6).fit((picked / unit).double().numpy())
        w = torch.tensor(solver.coef_[0]).float() / unit
        rho = torch.tensor(-float(solver.intercept_[0])) / w.sum()
        w = w / w.sum()
    svm.support_vectors, svm.coefficients, svm.rho = w[None], torch.ones(1), rho.float().reshape(1)
