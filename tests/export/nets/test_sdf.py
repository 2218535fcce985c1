"""The networks of signed distances: figures of the authors' module, exact rewrites, and what pulling learns."""

import numpy as np
import torch
from m3ad_export.heads.sdf_folds import FoldedDistance, FoldedEncoder
from m3ad_export.nets.configs import SdfConfig
from m3ad_export.nets.sdf import SdfNetwork, normalised
from named_weights import assert_golden, fill, given

TINY = SdfConfig(channels=(8, 12, 20), code=6, hidden=16, layers=3)


def test_features_and_distances_are_those_of_the_authors_module() -> None:
    network = fill(SdfNetwork(SdfConfig()))
    assert isinstance(network, SdfNetwork)
    patches = 0.3 * given(1, 2, 500, 3)
    codes = network.encoder(patches)
    assert_golden(codes, 0.199726, 0.313958, (0, 0, 0.365180))
    distance = network.NIF(codes[:1], patches[:1])
    assert_golden(distance, -0.235715, 0.006160, (-0.230553, -0.238792, -0.233841))
    assert len(network.state_dict()) == 64
    assert sum(p.numel() for p in network.encoder.parameters()) == 734_848
    assert sum(p.numel() for p in network.NIF.parameters()) == 2_435_585


def test_patches_are_as_long_as_their_longest_axis_about_their_mean() -> None:
    points = np.random.default_rng(0).normal(size=(3, 50, 3)) * [0.01, 0.04, 0.02] + [0.1, 0, 0.5]
    found = normalised(torch.from_numpy(points).float()).numpy()
    for patch, each in zip(found, points, strict=True):
        scaled = each / (each.max(axis=0) - each.min(axis=0)).max()
        np.testing.assert_allclose(patch, scaled - scaled.mean(axis=0), atol=1e-5)


def test_rewrites_are_the_networks() -> None:
    """More patches than are taken at once, the last run not full."""
    network = fill(SdfNetwork(TINY))
    assert isinstance(network, SdfNetwork)
    neighborhood = 0.02 * given(4, 70, 33, 3)
    patches = normalised(neighborhood)
    codes = network.encoder(patches)
    torch.testing.assert_close(FoldedEncoder(network.encoder)(neighborhood), codes, atol=1e-5, rtol=0)
    dense = network.NIF(codes, patches).abs()
    found = FoldedDistance(network.NIF)(neighborhood, codes)
    torch.testing.assert_close(found, dense, atol=1e-5 * float(dense.max()), rtol=0)


def test_points_are_pulled_along_the_gradient_by_their_distance() -> None:
    """Against central differences in float64."""
    network = fill(SdfNetwork(TINY)).double()
    assert isinstance(network, SdfNetwork)
    patches, queries = given(1, 2, 40, 3).double(), 0.4 * given(2, 2, 5, 3).double()
    found = network.pulled(patches, queries)
    distance = network(patches, queries)
    steps = 1e-6 * torch.eye(3).double()
    slopes = torch.stack(
        [(network(patches, queries + s) - network(patches, queries - s)) / 2e-6 for s in steps], dim=2
    )
    expected = queries - distance[:, :, None] * slopes / slopes.norm(dim=2, keepdim=True)
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)
