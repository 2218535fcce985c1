"""What the ops refuse, and the sentence that says so."""

import numpy as np
import pytest
from m3ad.scored import scored_pixels
from m3ad_plugins import ops
from m3ad_plugins.gpu.cases import organised

POINTS, PIXEL = organised(5, 16, 100)
CENTERS = POINTS[:8]
SCORED = scored_pixels(PIXEL, 16)
OPERATOR = ops.interpolation_operator(POINTS, PIXEL, CENTERS, SCORED, 16)
ROWS = len(OPERATOR.scored_pixel)
NAN = np.where(np.arange(100)[:, None] == 3, np.float32(np.nan), POINTS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.farthest_point_sample(POINTS, 101),
            "num_samples: expected 1..N with N = 100 points, got 101",
        ),
        (
            lambda: ops.farthest_point_sample(POINTS, 0),
            "num_samples: expected 1..N with N = 100 points, got 0",
        ),
        (lambda: ops.farthest_point_sample(NAN, 4), "points: 3 of 300 values are NaN or infinite"),
        (
            lambda: ops.farthest_point_sample(POINTS, 4, -1.0),
            "min_norm_sq: expected a finite value >= 0, got -1",
        ),
        (
            lambda: ops.farthest_point_sample(POINTS.astype(np.float64), 4),
            r"points: expected float32 \[N, 3\], got float64 \[100, 3\]",
        ),
        (
            lambda: ops.farthest_point_sample(POINTS[:, :2], 4),
            r"points: expected float32 \[N, 3\], got float32 \[100, 2\]",
        ),
        (
            lambda: ops.farthest_point_sample(POINTS, 4, 0.0, PIXEL[:50], 16),
            r"point_pixel: expected int32 \[100\], got int32 \[50\]",
        ),
        (lambda: ops.point_group(POINTS, 101, 4), "num_samples: expected 1..N with N = 100 points, got 101"),
        (lambda: ops.point_group(POINTS, 4, 101), "group_size: expected 1..N with N = 100 points, got 101"),
        (
            lambda: ops.knn_group(POINTS, np.arange(4, dtype=np.int32), 101),
            "group_size: expected 1..N with N = 100 points, got 101",
        ),
        (
            lambda: ops.knn_group(POINTS, np.array([0, 100], np.int32), 4),
            "idx: expected indices 0..99, got 0..100",
        ),
        (lambda: ops.knn_group(POINTS, np.arange(4), 4), r"idx: expected int32 \[G\], got int64 \[4\]"),
        (
            lambda: ops.interpolation_operator(POINTS, PIXEL + 200, CENTERS, SCORED, 16),
            r"point_pixel: expected pixels 0..255 of a 16 x 16 image, got",
        ),
        (
            lambda: ops.interpolation_operator(POINTS, np.full(100, 9, np.int32), CENTERS, SCORED, 16),
            "point_pixel: pixel 9 is named by 100 points, expected one",
        ),
        (
            lambda: ops.interpolation_operator(POINTS, PIXEL, CENTERS[:2], SCORED, 16),
            "centers: expected at least 3 of them to interpolate between, got 2",
        ),
        (
            lambda: ops.interpolation_operator(POINTS, PIXEL, CENTERS, SCORED, 16, 3),
            "output_size: expected a quarter of image_size 16 up to it, got 3",
        ),
        (
            lambda: ops.token_interpolate(POINTS, PIXEL, CENTERS, CENTERS, SCORED, 16, 17),
            "output_size: expected a quarter of image_size 16 up to it, got 17",
        ),
        (
            lambda: ops.interpolation_operator(POINTS, PIXEL, CENTERS, np.int32([16]), 16, 4),
            r"scored_pixel: expected pixels 0..15, got 16..16",
        ),
        (
            lambda: OPERATOR.apply(CENTERS[:5]),
            r"tokens: expected float32 \[8, D\], got float32 \[5, 3\]",
        ),
        (
            lambda: (
                ops.interpolation_operator(POINTS, PIXEL, CENTERS, SCORED, 16)
                .tiles({"t": CENTERS}, 0)
                .__next__()
            ),
            "rows: expected at least 1, got 0",
        ),
        (
            lambda: ops.SparseRows(np.int32([0, 1]), np.int32([8]), np.ones(1, np.float32), np.int32([0]), 8),
            "indices: expected 0..7, got 8..8",
        ),
        (
            lambda: ops.SparseRows(np.int32([0, 2]), np.int32([3]), np.ones(1, np.float32), np.int32([0]), 8),
            "indptr: expected 0 rising to the 1 entries, got",
        ),
        (
            lambda: OPERATOR.interpolated(CENTERS).write(0, np.empty((4, 2), np.float32)),
            rf"out: expected float32 \[T, 3\] in C order for rows of {ROWS} from 0 on, got float32 \[4, 2\]",
        ),
        (
            lambda: OPERATOR.interpolated(CENTERS).write(ROWS - 3, np.empty((4, 3), np.float32)),
            rf"rows of {ROWS} from {ROWS - 3} on, got float32 \[4, 3\]",
        ),
        (lambda: OPERATOR.interpolated(CENTERS).write(-1, np.empty((4, 3), np.float32)), "from -1 on, got"),
        (lambda: OPERATOR.interpolated(CENTERS).write(0, np.empty((4, 3))), r"got float64 \[4, 3\]"),
        (
            lambda: OPERATOR.interpolated(CENTERS).write(0, np.empty((3, 4), np.float32).T),
            "in C order for rows",
        ),
        (
            lambda: ops.cosine_scores([POINTS, CENTERS], [[POINTS]]),
            "features: expected as many as reconstructed, got 2 and 1",
        ),
        (
            lambda: ops.cosine_scores([CENTERS], [[]]),
            "reconstructed: expected at least one block of columns of each, got none",
        ),
        (
            lambda: ops.cosine_scores([CENTERS], [CENTERS]),  # type: ignore[list-item]
            "reconstructed: expected at least one block of columns of each, got a bare array; put it in a list",
        ),
        (
            lambda: ops.cosine_scores([CENTERS], [[CENTERS[:, :1], CENTERS[:, :1]]]),
            r"features: expected float32 \[8, 2\], got float32 \[8, 3\]",
        ),
        (
            lambda: ops.nearest_row(POINTS, CENTERS[:, :2]),
            r"bank: expected float32 \[B, 3\], got float32 \[8, 2\]",
        ),
        (lambda: ops.nearest_row(POINTS, CENTERS[:0]), "bank: expected at least 1 row, got 0"),
        (
            lambda: ops.one_class_svm(POINTS, CENTERS, CENTERS[:, 0], 0.0, "poly"),
            "kernel: expected one of linear, rbf, got 'poly'",
        ),
        (
            lambda: ops.one_class_svm(POINTS, CENTERS, CENTERS[:, 0], 0.0, "rbf", 0.0),
            "gamma: expected a finite value > 0, got 0",
        ),
        (
            lambda: ops.one_class_svm(POINTS, CENTERS, CENTERS[:3, 0].copy(), 0.0),
            r"coefficients: expected float32 \[8\], got float32 \[3\]",
        ),
    ],
)
def test_wrong_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
