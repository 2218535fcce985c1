"""The case table: every form of every op is run against its NumPy reference on these rows, here and on a GPU.

An op stands here twice: its rows, on a cloud (`rows_on`) or of its own (`OWN_ROWS`), and what its CUDA launcher takes
(`LAUNCHES`). The tests of a form go through the rows and name no op.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from m3ad_plugins.arrays import Float32, Int32
from m3ad_plugins.farthest_point_sample.reference import farthest_point_sample
from m3ad_plugins.onnx_functions import folder_of
from m3ad_plugins.token_interpolate.reference import scored_pixels


@dataclass(frozen=True)
class Case:
    """One cloud: points [N, 3] on pixels [N] of an image_size grid, G samples, S neighbours."""

    name: str
    points: Float32
    point_pixel: Int32
    num_samples: int
    group_size: int
    image_size: int = 224
    min_norm_sq: float = 0.0

    def __str__(self) -> str:
        return self.name


def organised(seed: int, image_size: int, keep: int, depth_m: float = 0.4) -> tuple[Float32, Int32]:
    """A bumpy surface seen by a camera: `keep` of its pixels, what is missing lies mostly in two blobs."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:image_size, :image_size].reshape(2, -1)
    x, y = (u / image_size - 0.5) * 0.2, (v / image_size - 0.5) * 0.2
    z = depth_m + 0.01 * np.sin(30 * x) * np.cos(25 * y) + rng.normal(0, 2e-4, len(x))
    points = np.stack([x, y, z], 1).astype(np.float32)
    hole = np.minimum(np.hypot(u - image_size * 0.3, v - image_size * 0.6), np.hypot(u, v - image_size * 0.1))
    order = np.argsort(-hole + rng.uniform(0, image_size * 0.05, len(hole)), kind="stable")
    pixel = np.sort(order[:keep]).astype(np.int32)
    return points[pixel], pixel


def scattered(points: Float32, image_size: int, seed: int) -> Int32:
    """Distinct random pixels for points that have none of their own, in no order."""
    pixels = np.random.default_rng(seed).permutation(image_size * image_size)
    return pixels[: len(points)].astype(np.int32)


def _cloud(name: str, points: Float32, samples: int, group: int, image_size: int = 64, **kw: float) -> Case:
    return Case(name, points, scattered(points, image_size, 7), samples, group, image_size, **kw)


def _small() -> list[Case]:
    rng = np.random.default_rng(3)
    normal = rng.normal(0, 1, (600, 3)).astype(np.float32)
    grid = np.stack(np.meshgrid(*[np.arange(8)] * 3), -1).reshape(-1, 3).astype(np.float32)
    line = (rng.permutation(400)[:, None] * np.array([[1, 2, 0]])).astype(np.float32)
    row = np.arange(64, dtype=np.int32)
    in_row = np.stack([row * 0.001, row * 0, row * 0 + 0.5], 1).astype(np.float32)
    metres, metres_pixel = organised(1, 64, 1500)
    return [
        _cloud("random", normal, 128, 32),
        _cloud("ties: integer grid", grid, 200, 32),
        _cloud("duplicates", np.repeat(normal[:40], 10, axis=0), 64, 32),
        _cloud("all points equal", np.full((50, 3), 0.4, np.float32), 8, 50),
        _cloud("N = G", normal[:96], 96, 16),
        _cloud("N = S", normal[:33], 5, 33),
        _cloud("collinear", line, 100, 32),
        _cloud("coplanar", normal * np.asarray([1, 1, 0], np.float32), 100, 32),
        _cloud("three points", normal[:3], 3, 3, 8),
        Case("one row", in_row, row + 64 * 20, 16, 8, 64),
        Case("one column", in_row[:30], row[:30] * 64, 16, 8, 64),
        Case("0.4 m, holes", metres, metres_pixel, 256, 32, 64),
        Case("centred, holes", metres - metres.mean(0), metres_pixel, 256, 32, 64),
        Case("full grid", *organised(2, 32, 32 * 32), 128, 32, 32),
        Case("points not in pixel order", metres[::-1].copy(), metres_pixel[::-1].copy(), 256, 32, 64),
        _cloud("skip near origin", normal, 64, 8, min_norm_sq=1.0),
        _cloud("skip all but few", normal, 64, 8, min_norm_sq=9.0),
        _cloud("large coordinates", normal * 1000 + np.float32(5000), 100, 32),
    ]


def _full() -> list[Case]:
    return [
        Case(f"N = {count}", *organised(count, 224, count), 1024, 32) for count in (1024, 1025, 17000, 50176)
    ]


SMALL = _small()
FULL = _full()


@dataclass(frozen=True)
class Row:
    """One call of an op, by the contract's names, and how far a form may lie from the reference."""

    op: str
    name: str
    inputs: dict[str, np.ndarray]
    attributes: dict[str, Any]
    rtol: float = 0.0  # with atol 0: identical
    atol: float = 0.0

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"

    def expected(self) -> tuple[np.ndarray, ...]:
        """What the reference makes of it, tokens of half precision taken as fp32."""
        folder = folder_of(self.op)
        reference = getattr(import_module(f"m3ad_plugins.{folder}.reference"), folder)
        half = np.float16
        inputs = {n: v.astype(np.float32) if v.dtype == half else v for n, v in self.inputs.items()}
        found = reference(**inputs, **self.attributes)
        return found if isinstance(found, tuple) else (found,)

    def check(self, found: tuple[np.ndarray, ...]) -> None:
        """Compare a form's outputs with the reference's."""
        for got, wanted in zip(found, self.expected(), strict=True):
            assert got.dtype == (
                self.inputs["tokens"].dtype if self.op == "TokenInterpolate" else wanted.dtype
            )
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got.astype(wanted.dtype), wanted, rtol=self.rtol, atol=self.atol)


def rows_on(case: Case, width: int, tokens_dtype: type = np.float32) -> list[Row]:
    """A row of each op that takes a cloud."""
    points, size = case.points, case.image_size
    idx = farthest_point_sample(points, case.num_samples, case.min_norm_sq)
    drawn = np.random.default_rng(width).normal(0, 1, (len(idx), width))
    tokens: np.ndarray = drawn.astype(tokens_dtype)
    spread = {"points": points, "point_pixel": case.point_pixel, "centers": points[idx], "tokens": tokens}
    # Sums are fp32, rounded once to the tokens' type.
    near = {"rtol": 2**-11 if tokens_dtype is np.float16 else 1e-5, "atol": 2e-6}
    everywhere = np.arange(0, size**2, 3, dtype=np.int32)  # some rows are empty
    sampling = {"num_samples": case.num_samples, "min_norm_sq": case.min_norm_sq}
    image, coarse = (
        {"image_size": size, "output_size": size},
        {"image_size": size, "output_size": -(-size // 4)},
    )
    return [
        Row("FarthestPointSample", case.name, {"points": points, "point_pixel": case.point_pixel}, sampling),
        Row("KnnGroup", case.name, {"points": points, "idx": idx}, {"group_size": case.group_size}),
        *(
            Row("TokenInterpolate", name, {**spread, "scored_pixel": pixel}, grids, **near)
            for name, pixel, grids in (
                (case.name, scored_pixels(case.point_pixel, size), image),
                (f"{case.name}, any pixels", everywhere, image),
                (f"{case.name}, a coarser grid", scored_pixels(case.point_pixel, **coarse), coarse),
            )
        ),
    ]


def _svm_row(kernel: str, rows: int, width: int, vectors: int) -> Row:
    rng = np.random.default_rng(rows)
    inputs = {
        "x": rng.normal(0, 1, (rows, width)).astype(np.float32),
        "support_vectors": rng.normal(0, 1, (vectors, width)).astype(np.float32),
        "coefficients": rng.normal(0, 1, vectors).astype(np.float32),
        "rho": np.asarray([0.25], np.float32),
    }
    name, attributes = f"{kernel} {rows} x {width}, {vectors}", {"kernel": kernel, "gamma": 0.3}
    return Row("OneClassSvm", name, inputs, attributes, rtol=1e-5, atol=2e-5)


def _bank_row(name: str, x: np.ndarray, bank: np.ndarray) -> Row:
    inputs = {"x": x.astype(np.float32), "bank": bank.astype(np.float32)}
    return Row("NearestRow", name, inputs, {}, rtol=1e-6, atol=1e-9)


def _bank_rows() -> list[Row]:
    rng = np.random.default_rng(11)
    far = rng.normal(40, 1, (150, 33))  # where the expanded form alone loses small distances
    beside = far[rng.integers(150, size=70)] + rng.normal(0, 1e-3, (70, 33))
    twice = np.tile(rng.normal(0, 1, (80, 4)), (2, 1))
    return [
        _bank_row("1 x 1, 1", np.ones((1, 1)), np.full((1, 1), -2.5)),
        _bank_row("70 x 33, 150, far from the origin", beside, far),
        _bank_row("rows of the bank itself", far[::-3], far),
        _bank_row("ties: every row twice", rng.normal(0, 1, (90, 4)), twice),
        _bank_row(
            "equal queries", np.repeat(rng.normal(0, 1, (3, 17)), 30, axis=0), rng.normal(0, 1, (65, 17))
        ),
        _bank_row("64 x 16, 64", rng.normal(0, 1, (64, 16)), rng.normal(0, 1, (64, 16))),
    ]


OWN_ROWS = [
    *(
        _svm_row(kernel, *sizes)
        for kernel in ("linear", "rbf")
        for sizes in ((1, 1, 1), (300, 7, 90), (5, 40, 33))
    ),
    *_bank_rows(),
]


@dataclass(frozen=True)
class Launch:
    """What a launcher takes between its tensors and its workspace, and what its workspace is computed from."""

    sizes_and_attributes: tuple[int | float | bool, ...]
    workspace: int


def _launch_spread(inputs: dict[str, np.ndarray], attributes: dict[str, Any]) -> Launch:
    groups, width = inputs["tokens"].shape
    is_half, size = inputs["tokens"].dtype == np.float16, attributes["image_size"]
    sizes = (len(inputs["points"]), groups, width, len(inputs["scored_pixel"]))
    return Launch((*sizes, is_half, size, attributes["output_size"]), size)


def _launch_svm(inputs: dict[str, np.ndarray], attributes: dict[str, Any]) -> Launch:
    rows, width = inputs["x"].shape
    is_rbf, gamma = attributes["kernel"] == "rbf", attributes["gamma"]
    return Launch((rows, width, len(inputs["support_vectors"]), is_rbf, gamma), width)


def _launch_nearest(inputs: dict[str, np.ndarray], _attributes: dict[str, Any]) -> Launch:
    (queries, width), rows = inputs["x"].shape, len(inputs["bank"])
    return Launch((queries, width, rows), queries * -(-rows // 64))


LAUNCHES: dict[str, Callable[[dict[str, np.ndarray], dict[str, Any]], Launch]] = {
    "FarthestPointSample": lambda inputs, attributes: Launch(
        (len(inputs["points"]), attributes["num_samples"], float(attributes["min_norm_sq"])),
        len(inputs["points"]),
    ),
    "KnnGroup": lambda inputs, attributes: Launch(
        (len(inputs["points"]), len(inputs["idx"]), attributes["group_size"]), len(inputs["points"])
    ),
    "TokenInterpolate": _launch_spread,
    "OneClassSvm": _launch_svm,
    "NearestRow": _launch_nearest,
}
