import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from m3ad.scored import scored_pixels
from m3ad_export.heads.voting import (
    OneClassSvm,
    Vm,
    VotingConfig,
    fit_baseline,
    fit_one_class_svm,
    map_names,
    on_grid,
    score,
    smooth,
)
from scipy.ndimage import uniform_filter
from sklearn.svm import OneClassSVM


def smoothed(image: np.ndarray) -> np.ndarray:
    """CFM's chain of box filters by SciPy, in float64."""
    for size in (5, 5, 5, 5, 5, 7, 7, 7):
        image = uniform_filter(image, size, mode="constant", output=np.float64)
    return image


@given(distance=st.sampled_from([1.0, 1e-1, 1e-2, 1e-3, 1e-4]), seed=st.integers(0, 100))
def test_score_is_one_minus_cosine_also_where_it_is_tiny(distance: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(20, 64)).astype(np.float32)
    b = (a * 3 + distance * rng.normal(size=a.shape)).astype(np.float32)
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a64, b64)]
    expected = ((unit[0] - unit[1]) ** 2).sum(axis=1) / 2
    np.testing.assert_allclose(expected, 1 - (unit[0] * unit[1]).sum(axis=1), atol=1e-12)
    found = score(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-2 if distance < 1e-3 else 1e-3)


def test_smoothing_is_cfm_s_with_zero_padding() -> None:
    image = np.random.default_rng(0).random((2, 224, 224)).astype(np.float32)
    found = smooth(torch.from_numpy(image)).numpy()
    for one, expected in zip(found, image, strict=True):
        np.testing.assert_allclose(one, smoothed(expected), atol=1e-6)


def scores_and_pixels(rows: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    scores = rng.random((3, rows)).astype(np.float32)
    pixels = np.sort(rng.choice(224 * 224, rows, replace=False)).astype(np.int32)
    return torch.from_numpy(scores), torch.from_numpy(pixels)


def test_rows_go_to_their_pixels_and_the_rest_is_zero() -> None:
    scores, pixels = scores_and_pixels()
    expected = np.zeros((3, 224, 224), np.float32)
    expected[:, pixels.numpy() // 224, pixels.numpy() % 224] = scores.numpy()
    np.testing.assert_array_equal(on_grid(scores, pixels), expected)


def test_half_powers_without_the_mentor_are_cfm_s_product_up_to_one_half() -> None:
    scores, pixels = scores_and_pixels()
    vm = Vm(VotingConfig(exponents=((0.5, 0.5, 0),)))
    chord = np.sqrt(2 * on_grid(scores, pixels).numpy().astype(np.float64))  # CFM: |unit F~ - unit F|
    cfm = smoothed(chord[0] * chord[1])
    np.testing.assert_allclose(vm.score_maps(scores, pixels)[3], cfm / 2, atol=1e-6)


def test_the_vote_is_the_root_of_the_product_of_smoothed_terms() -> None:
    scores, pixels = scores_and_pixels()
    vm = Vm(VotingConfig())
    vm.svm.rho = torch.tensor([0.125])
    maps = vm.score_maps(scores, pixels)
    rgb, xyz, mentor = on_grid(scores, pixels).numpy().astype(np.float64)
    terms = [smoothed(m) for m in (rgb * xyz * mentor, rgb, xyz, mentor)]
    for found, expected in zip(maps, [*terms[1:], *terms], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(vm.vote(maps), np.prod(terms, axis=0) ** 0.25 - 0.125, rtol=1e-4, atol=1e-5)


def test_expected_is_the_mean_of_good_frames_over_their_cover_plus_a_quarter_of_its_median() -> None:
    parts = [np.arange(9000, 29000, dtype=np.int32), np.arange(14000, 29000, dtype=np.int32)]
    scored = [torch.from_numpy(scored_pixels(part)) for part in parts]  # all of what the part reaches
    scores = [k * scores_and_pixels(len(pixels))[0] for k, pixels in enumerate(scored, 1)]
    frames = list(zip(scores, scored, strict=True))
    vm = Vm(VotingConfig())
    fit_baseline(vm, [(s, p, torch.from_numpy(part)) for (s, p), part in zip(frames, parts, strict=True)])
    total, cover = np.zeros((3, 224, 224)), np.zeros((224, 224))
    for s, p in frames:
        grid = on_grid(torch.cat([s, torch.ones_like(s[:1])]), p).numpy().astype(np.float64)
        total += [smoothed(g) for g in grid[:3]]
        cover += smoothed(grid[3])
    assert (cover > 1).any()
    mean = total / np.maximum(cover, 1e-3)
    expected = mean + 0.25 * np.median(mean[:, cover > 1], axis=1)[:, None, None]
    np.testing.assert_allclose(vm.baseline.reshape(3, 224, 224), expected, rtol=1e-3)


def test_scores_enter_the_vote_as_multiples_of_the_expected() -> None:
    scores, pixels = scores_and_pixels()
    plain, vm = Vm(VotingConfig()), Vm(VotingConfig())
    vm.baseline = torch.rand(3, 224 * 224) + 0.5
    found = vm.score_maps(scores, pixels)
    torch.testing.assert_close(found, plain.score_maps(scores / vm.baseline[:, pixels.long()], pixels))
    assert not torch.allclose(found, plain.score_maps(scores, pixels), rtol=0.1)


def test_forward_scores_the_three_pairs_and_takes_the_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.arange(40, 1640, dtype=torch.int32)
    pairs = [torch.randn(1600, 8, generator=generator) for _ in range(6)]
    vm = Vm(VotingConfig())
    anomaly_map, largest, maps = vm(*pairs, pixels)
    cosines = [torch.cosine_similarity(a, b, dim=1) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    expected = vm.score_maps(1 - torch.stack(cosines), pixels)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)
    assert largest == anomaly_map.max()
    assert map_names(vm.config) == (
        "rgb",
        "xyz",
        "mentor",
        "vote rgb*xyz*mentor",
        "vote rgb",
        "vote xyz",
        "vote mentor",
    )


@pytest.mark.parametrize("nu", [0.1, 0.5, 0.9])
def test_scalar_svm_has_libsvm_s_boundary(nu: float) -> None:
    x = np.random.default_rng(0).lognormal(size=(1000, 1))
    svm = OneClassSvm(1)
    fit_one_class_svm(svm, torch.from_numpy(x).float(), nu)
    solver = OneClassSVM(kernel="linear", nu=nu, tol=1e-9).fit(x)
    boundary = -solver.intercept_[0] / solver.coef_[0, 0]
    assert svm.rho.item() == pytest.approx(boundary, rel=1e-2)
    assert svm.support_vectors.tolist() == [[1.0]]


def test_vector_svm_splits_as_libsvm_does_and_grows_with_every_term() -> None:
    scales = np.array([1e-4, 1.0, 30.0])  # voting terms differ by orders
    x = np.random.default_rng(0).lognormal(sigma=0.3, size=(1000, 3)) * scales
    svm = OneClassSvm(3)
    fit_one_class_svm(svm, torch.from_numpy(x).float())
    decision = svm(torch.from_numpy(x).float()).numpy()
    reference = OneClassSVM(kernel="linear", nu=0.5, tol=1e-6).fit(x / x.mean(axis=0))
    expected = reference.decision_function(x / x.mean(axis=0))
    assert np.corrcoef(decision, expected)[0, 1] > 0.9999
    assert np.mean((decision > 0) == (expected > 0)) > 0.99
    assert (svm.support_vectors > 0).all()


def test_rbf_decision_is_sklearn_s() -> None:
    x = np.random.default_rng(0).normal(size=(200, 3))
    solver = OneClassSVM(kernel="rbf", nu=0.3, gamma=0.7).fit(x)
    svm = OneClassSvm(3, len(solver.support_vectors_), kernel="rbf")
    svm.gamma = 0.7
    svm.support_vectors = torch.from_numpy(solver.support_vectors_)
    svm.coefficients = torch.from_numpy(solver.dual_coef_[0])
    svm.rho = torch.tensor([-solver.intercept_[0]])
    np.testing.assert_allclose(svm(torch.from_numpy(x)), solver.decision_function(x), atol=1e-9)


@pytest.mark.parametrize("table", [(), ((0, 0, 0),), ((1, -1, 0),)])
def test_a_voting_table_that_says_nothing_is_refused(table: tuple[tuple[float, float, float], ...]) -> None:
    with pytest.raises(ValueError, match="each voting term needs exponents >= 0"):
        VotingConfig(exponents=table)
