"""The ops against their NumPy specification, and the specification against torch."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from m3ad.contract import OPS
from m3ad.scored import scored_pixels
from m3ad_plugins import native, ops, sparse_rows, token_interpolate
from m3ad_plugins.farthest_point_sample.reference import farthest_point_sample
from m3ad_plugins.gpu.cases import FULL, LAUNCHES, OWN_ROWS, SMALL, Case, Row, organised, rows_on
from m3ad_plugins.knn_group.reference import knn_group
from m3ad_plugins.onnx_functions import folder_of
from m3ad_plugins.sparse_rows.reference import cosine_scores
from m3ad_plugins.token_interpolate import reference
from scipy.spatial import distance

small = pytest.mark.parametrize("case", SMALL, ids=str)
full = pytest.mark.parametrize("case", FULL, ids=str)
forms = pytest.mark.usefixtures("form")
RNG = np.random.default_rng(0)
OP_ROWS = [*rows_on(SMALL[0], 5), *OWN_ROWS]
POINTS, PIXEL = organised(5, 16, 100)
CENTERS = POINTS[:8]
OPERATOR = ops.interpolation_operator(POINTS, PIXEL, CENTERS, scored_pixels(PIXEL, 16), 16)
ROWS = len(OPERATOR.scored_pixel)


@pytest.fixture(params=["C++", "NumPy"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form of the ops in turn; without the library the NumPy form is taken."""
    if request.param == "NumPy":
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        assert native.library() is not None


def dense(operator: ops.SparseRows) -> np.ndarray:
    return operator.apply(np.eye(operator.groups, dtype=np.float32))


def check_sampling_and_grouping(case: Case) -> None:
    sampling = (case.num_samples, case.min_norm_sq)
    expected_idx = farthest_point_sample(case.points, *sampling)
    expected, expected_knn = knn_group(case.points, expected_idx, case.group_size)
    for grid in ((None, case.image_size), (case.point_pixel, case.image_size)):
        idx = ops.farthest_point_sample(case.points, *sampling, *grid)
        np.testing.assert_array_equal(idx, expected_idx)
        neighborhood, knn_idx = ops.knn_group(case.points, idx, case.group_size, *grid)
        np.testing.assert_array_equal(knn_idx, expected_knn)
        np.testing.assert_array_equal(neighborhood, expected)
        assert {array.dtype.name for array in (idx, knn_idx)} == {"int32"}
        assert neighborhood.dtype == np.float32
        together = ops.point_group(case.points, case.num_samples, case.group_size, case.min_norm_sq, *grid)
        for found, apart in zip(together, (idx, neighborhood, knn_idx), strict=True):
            np.testing.assert_array_equal(found, apart)


def check_interpolation(case: Case, width: int) -> None:
    idx = farthest_point_sample(case.points, case.num_samples, case.min_norm_sq)
    tokens = RNG.normal(0, 1, (case.num_samples, width)).astype(np.float32)
    arguments = (case.points, case.point_pixel, case.points[idx])
    size = case.image_size
    for side in (size, -(-size // 4), -(-size // 2)):
        scored_pixel = scored_pixels(case.point_pixel, size, side)
        np.testing.assert_array_equal(scored_pixel, reference.scored_pixels(case.point_pixel, size, side))
        for pixel in (
            scored_pixel,
            np.arange(0, side**2, 3, dtype=np.int32),
        ):  # some rows of the latter are empty
            spread = native.choose(token_interpolate.in_cpp, token_interpolate.in_numpy)
            operator = spread(*arguments, pixel, size, side)
            rows = np.empty((len(pixel), width), np.float32)
            native.choose(sparse_rows.apply_in_cpp, sparse_rows.apply_in_numpy)(operator, tokens, rows)
            expected = reference.token_interpolate(*arguments, tokens, pixel, size, side)
            np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=2e-6)
            assert [array.dtype.name for array in operator] == ["int32", "int32", "float32"]


def test_every_op_of_the_contract_has_rows_and_a_launch() -> None:
    assert {row.op for row in OP_ROWS} == {*OPS} == {*LAUNCHES}


@forms
@pytest.mark.parametrize("row", [r for r in OP_ROWS if "any pixels" not in r.name], ids=str)
def test_every_op_takes_what_its_node_takes(row: Row) -> None:
    arguments = {**row.inputs, **row.attributes}
    if row.op == "OneClassSvm":
        arguments["rho"] = row.inputs["rho"].item()
    found = getattr(ops, folder_of(row.op))(**arguments)
    row.check(found if isinstance(found, tuple) else (found,))


@forms
@small
def test_sampling_and_grouping_equal_reference(case: Case) -> None:
    check_sampling_and_grouping(case)


@forms
@small
def test_interpolation_equals_reference(case: Case) -> None:
    for width in (5, 16, 70, 147):  # blocks of 64, of 16, single columns
        check_interpolation(case, width)


@small
def test_operator_rows_hold_the_reference_weights(case: Case) -> None:
    idx = farthest_point_sample(case.points, case.num_samples, case.min_norm_sq)
    arguments = (case.points, case.point_pixel, case.points[idx])
    scored_pixel = scored_pixels(case.point_pixel, case.image_size)
    operator = ops.interpolation_operator(*arguments, scored_pixel, case.image_size)
    eye = np.eye(case.num_samples, dtype=np.float32)
    expected = reference.token_interpolate(*arguments, eye, scored_pixel, case.image_size)
    weights = dense(operator)
    np.testing.assert_array_equal(weights > 0, expected > 0)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)
    rows = len(operator.scored_pixel)
    for tile in (1, rows // 2 + 1, rows, rows + 3):
        tiles = [
            {n: t.copy() for n, t in each.items()} for each in operator.tiles({"a": eye, "b": -eye}, tile)
        ]
        assert [len(t["a"]) for t in tiles[:-1]] == [tile] * (-(-rows // tile) - 1)
        np.testing.assert_array_equal(np.concatenate([t["a"] for t in tiles]), weights)
        np.testing.assert_array_equal(np.concatenate([t["b"] for t in tiles]), -weights)
    for begin, end in zip(operator.indptr[:-1], operator.indptr[1:], strict=True):
        assert (np.diff(operator.indices[begin:end]) > 0).all()


@pytest.mark.slow
@forms
@full
def test_full_size_equals_reference(case: Case) -> None:
    check_sampling_and_grouping(case)
    check_interpolation(case, 16)


@pytest.mark.parametrize(
    ("image_size", "output_size"),
    [(3, 3), (4, 4), (17, 17), (224, 224), (224, 56), (224, 100), (17, 5), (5, 2)],
)
def test_pooling_equals_torch(image_size: int, output_size: int) -> None:
    torch = pytest.importorskip("torch", reason="the independent form of the pooling is torch's")
    image = torch.rand(1, 3, image_size, image_size)
    pool = torch.nn.Sequential(torch.nn.AvgPool2d(3, 1), torch.nn.AdaptiveAvgPool2d(output_size))
    matrix = torch.from_numpy(reference.pooling_matrix(image_size, output_size))
    torch.testing.assert_close(matrix @ image @ matrix.T, pool(image), rtol=1e-5, atol=1e-6)


def test_pooling_has_the_taps_of_m3dm() -> None:
    matrix = reference.pooling_matrix(224)
    assert np.flatnonzero(matrix[50]).tolist() == [49, 50, 51, 52]
    assert np.flatnonzero(matrix[150]).tolist() == [148, 149, 150, 151]
    np.testing.assert_allclose(matrix[50, 49:53] * 6, [1, 2, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)


@forms
def test_without_an_output_size_it_is_the_image_size() -> None:
    arguments = (POINTS, PIXEL, CENTERS, CENTERS, OPERATOR.scored_pixel, 16)
    np.testing.assert_array_equal(ops.token_interpolate(*arguments), ops.token_interpolate(*arguments, 16))
    np.testing.assert_array_equal(reference.pooling_matrix(16), reference.pooling_matrix(16, 16))


@forms
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(3, 40), st.integers(0, 2**32 - 1), st.data())
def test_any_output_grid_equals_torch(size: int, seed: int, data: st.DataObject) -> None:
    torch = pytest.importorskip("torch", reason="the independent form of the pooling is torch's")
    side = data.draw(st.integers(-(-size // 4), size))
    rng = np.random.default_rng(seed)
    pixel = rng.permutation(size * size)[: rng.integers(1, size * size + 1)].astype(np.int32)
    points, centers = (rng.normal(size=(n, 3)).astype(np.float32) for n in (len(pixel), 5))
    near, weights = reference.nearest_three(points, centers)
    image = np.zeros((size * size, 5), np.float32)
    image[pixel[:, None], near] = weights
    pool = torch.nn.Sequential(torch.nn.AvgPool2d(3, 1), torch.nn.AdaptiveAvgPool2d(side))
    pooled = pool(torch.from_numpy(image.T.reshape(1, 5, size, size)))[0].flatten(1).T.numpy()
    operator = ops.interpolation_operator(
        points, pixel, centers, scored_pixels(pixel, size, side), size, side
    )
    np.testing.assert_array_equal(operator.scored_pixel, np.flatnonzero(pooled.sum(1) > 1e-7))
    np.testing.assert_allclose(dense(operator), pooled[operator.scored_pixel], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", [40, 10, 27])
@pytest.mark.parametrize("keep", [1, 5, 700, 40 * 40])
def test_interpolation_equals_torch(keep: int, side: int) -> None:
    """Scatter -> AvgPool2d(3, 1) -> AdaptiveAvgPool2d(S) on random holes: set of rows, weights."""
    torch = pytest.importorskip("torch", reason="the independent form of the pooling is torch's")
    size, groups = 40, 48
    points, pixel = organised(keep, size, keep)
    centers = RNG.normal(0, 0.1, (groups, 3)).astype(np.float32) + points.mean(0)
    near, index = (
        torch.from_numpy(points)[:, None]
        .sub(torch.from_numpy(centers))
        .square()
        .sum(-1)
        .topk(3, largest=False)
    )
    weights = 1 / (near + 1e-8)
    scatter = torch.zeros(size * size, groups)
    scatter[torch.from_numpy(pixel).long()] = torch.zeros(keep, groups).scatter(
        1, index, weights / weights.sum(1, keepdim=True)
    )
    pool = torch.nn.Sequential(torch.nn.AvgPool2d(3, 1), torch.nn.AdaptiveAvgPool2d(side))
    expected = pool(scatter.T.reshape(1, groups, size, size)).reshape(groups, -1).T.numpy()
    operator = ops.interpolation_operator(
        points, pixel, centers, scored_pixels(pixel, size, side), size, side
    )
    np.testing.assert_array_equal(operator.scored_pixel, np.flatnonzero(expected.sum(1) > 1e-6))
    np.testing.assert_allclose(dense(operator), expected[operator.scored_pixel], rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 300), st.just(3)), elements=st.floats(-2, 2, width=16)),
    st.data(),
)
def test_any_cloud_equals_reference(points: np.ndarray, data: st.DataObject) -> None:
    samples, group = (data.draw(st.integers(1, len(points))) for _ in range(2))
    pixel = RNG.permutation(32 * 32)[: len(points)].astype(np.int32)
    check_sampling_and_grouping(Case("drawn", points, pixel, samples, group, 32))


@forms
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 3), (700, 40), (129, 1152)])
def test_nearest_row_equals_scipy(rows: int, width: int) -> None:
    bank = (RNG.normal(0, 1, (rows, width)) + 100).astype(np.float32)
    near = bank[RNG.integers(rows, size=50)] + RNG.normal(0, 1e-4, (50, width))
    x = np.concatenate([near, RNG.normal(0, 1, (20, width)), bank[:9]]).astype(np.float32)
    pairs = distance.cdist(x.astype(np.float64), bank.astype(np.float64))
    found, idx = ops.nearest_row(x, bank)
    np.testing.assert_array_equal(idx, pairs.argmin(axis=1))
    np.testing.assert_allclose(found, pairs.min(axis=1), rtol=1e-7, atol=1e-12)
    assert (found[70:] == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 90), st.integers(1, 7), st.integers(1, 4), st.integers(0, 9))
def test_nearest_row_ties_go_to_the_lowest_of_any_number(
    rows: int, queries: int, width: int, values: int, seed: int
) -> None:
    """On a coarse grid hundreds of rows are equally near, and the product in fp32 tells none of them apart."""
    rng = np.random.default_rng(seed)
    x, bank = ((rng.integers(0, values, (count, width)) / 7).astype(np.float32) for count in (queries, rows))
    found, idx = ops.nearest_row(x, bank)
    expected = ((x.astype(np.float64)[:, None] - bank) ** 2).sum(axis=2)
    np.testing.assert_array_equal(idx, expected.argmin(axis=1))
    np.testing.assert_allclose(found**2, expected.min(axis=1), rtol=1e-6, atol=1e-12)


@forms
def test_nearest_row_takes_what_overflows_and_no_query() -> None:
    bank = np.float32([[3e38, 0], [-3e38, 0], [1, 1]])
    found, idx = ops.nearest_row(np.float32([[3e38, 1], [-3e38, 0], [2, 1]]), bank)
    assert (found.tolist(), idx.tolist()) == ([1.0, 0.0, 1.0], [0, 1, 2])
    found, idx = ops.nearest_row(np.empty((0, 2), np.float32), bank)
    assert (found.shape, idx.shape) == ((0,), (0,))


def test_nearest_row_measures_rows_whose_products_overflow() -> None:
    # About the mean (7e29, 1e38) the product of the second row is -2e59 + 1e76: -inf in a chain of fp32.
    found, idx = ops.nearest_row(np.float32([[1e30, 0]]), np.float32([[-5e29, 0], [0, 0], [2.5e30, 3e38]]))
    assert idx == 1
    np.testing.assert_allclose(found, 1e30, rtol=1e-6)


@forms
@pytest.mark.parametrize("kernel", ops.KERNELS)
@pytest.mark.parametrize(("rows", "width", "vectors"), [(1, 1, 1), (7, 3, 5), (500, 9, 130), (3, 256, 2)])
def test_one_class_svm_equals_scikit_learn(kernel: str, rows: int, width: int, vectors: int) -> None:
    pairwise = pytest.importorskip(
        "sklearn.metrics.pairwise", reason="the independent form is scikit-learn's"
    )
    x, support = (RNG.normal(0, 1, (count, width)).astype(np.float32) for count in (rows, vectors))
    coefficients = RNG.normal(0, 1, vectors).astype(np.float32)
    kernels = {
        "linear": pairwise.linear_kernel,
        "rbf": lambda a, b: pairwise.rbf_kernel(a.astype(float), b.astype(float), 0.3),
    }
    expected = kernels[kernel](x, support) @ coefficients - 0.25
    decision = ops.one_class_svm(x, support, coefficients, 0.25, kernel, 0.3)
    assert decision.dtype == np.float32
    np.testing.assert_allclose(decision, expected, rtol=1e-4, atol=2e-5 * width)


@forms
@pytest.mark.parametrize(("rows", "widths"), [(1, (1,)), (7, (16, 5, 33)), (300, (768, 1152, 256))])
def test_cosine_scores_equal_one_minus_the_cosine(rows: int, widths: tuple[int, ...]) -> None:
    features = [RNG.normal(0, 3, (rows, width)).astype(np.float32) for width in widths]
    # Scores down to 1e-7, where 1 - cos has no digits left in fp32.
    apart = np.geomspace(1e-3, 10, rows)[:, None]
    again = [(a + apart * RNG.normal(0, 1, a.shape)).astype(np.float32) for a in features]
    blocks = [np.array_split(b, [b.shape[1] // 3, b.shape[1] // 2], axis=1) for b in again]
    blocks = [[np.ascontiguousarray(block) for block in each if block.shape[1]] for each in blocks]
    found = ops.cosine_scores(features, blocks)
    pairs = [zip(a.astype(float), b.astype(float), strict=True) for a, b in zip(features, again, strict=True)]
    expected = np.array([[distance.cosine(a, b) for a, b in pair] for pair in pairs])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-12)
    np.testing.assert_allclose(found[expected > 1e-3], expected[expected > 1e-3], rtol=1e-5)


@forms
def test_cosine_scores_of_zero_and_missing_rows() -> None:
    a, b = (RNG.normal(0, 1, (4, 20)).astype(np.float32) for _ in range(2))
    a[0], b[1], b[3, 7] = 0, 0, np.nan
    scores = ops.cosine_scores([a], [[b]])[0]
    np.testing.assert_allclose(scores[:2], 0.5, rtol=1e-6)
    assert 0 < scores[2] < 2
    assert np.isnan(scores[3])


@forms
@pytest.mark.parametrize("threads", [1, 3, None])
def test_interpolated_rows_are_written_from_any_start(threads: int | None) -> None:
    table = RNG.normal(0, 1, (8, 70)).astype(np.float32)
    expected = OPERATOR.apply(table)
    for start, count in ((0, ROWS), (3, 1), (41, ROWS - 41), (ROWS, 0)):
        out = np.full((count, 70), np.nan, np.float32)
        OPERATOR.interpolated(table).write(start, out, threads)
        np.testing.assert_array_equal(out, expected[start : start + count])


@forms
@pytest.mark.parametrize("start", [0, 3, 41])
def test_cosine_scores_form_interpolated_rows_themselves(start: int) -> None:
    tables = [RNG.normal(0, 1, (8, width)).astype(np.float32) for width in (40, 70)]
    rows = [OPERATOR.apply(table)[start:] for table in tables]
    again = [[a + RNG.normal(0, 0.1, a.shape).astype(np.float32)] for a in (*rows, rows[0])]
    again[1] = [np.ascontiguousarray(part) for part in np.split(again[1][0], [33], axis=1)]
    found = ops.cosine_scores([*map(OPERATOR.interpolated, tables), rows[0]], again, start)
    np.testing.assert_allclose(found, cosine_scores([*rows, rows[0]], again), rtol=1e-4)
    message = f"expected interpolated rows {start + 1}..{ROWS} of 40 columns"
    with pytest.raises(ValueError, match=message):
        ops.cosine_scores([OPERATOR.interpolated(tables[0])], again[:1], start + 1)
