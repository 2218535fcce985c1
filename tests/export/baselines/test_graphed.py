"""The whole frame with the ops between, on a CPU: the dense form's map, and nothing that a CUDA graph cannot hold."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_input, make_tiny_detector
from m3ad.errors import M3adError
from m3ad_export.baselines import graphed
from m3ad_export.baselines.forms import dense
from m3ad_export.baselines.graphed import measured, require_same_map, with_ops
from m3ad_plugins import ops
from torch import Tensor


class HostOps:
    """The portable C++ ops."""

    def point_group(
        self, points: Tensor, groups: int, size: int, min_norm_sq: float
    ) -> tuple[Tensor, Tensor]:
        idx = ops.farthest_point_sample(points.numpy(), groups, min_norm_sq)
        return torch.from_numpy(idx), torch.from_numpy(ops.knn_group(points.numpy(), idx, size)[0])

    def rows(
        self, points: Tensor, point_pixel: Tensor, centers: Tensor, tokens: Tensor, at: Tensor
    ) -> Tensor:
        arrays = (np.ascontiguousarray(each) for each in (points, point_pixel, centers, tokens, at))
        return torch.from_numpy(ops.token_interpolate(*arrays))


class ShapesOnly:
    """What the ops return, without values."""

    def point_group(
        self, points: Tensor, groups: int, size: int, min_norm_sq: float
    ) -> tuple[Tensor, Tensor]:
        return torch.empty(groups, dtype=torch.int32, device="meta"), points.new_empty(groups, size, 3)

    def rows(
        self, points: Tensor, point_pixel: Tensor, centers: Tensor, tokens: Tensor, at: Tensor
    ) -> Tensor:
        return tokens.new_empty(len(at), tokens.shape[1])


NAMES = ("image", "points", "point_pixel", "scored_pixel")


@torch.inference_mode()
def test_frame_with_ops_has_the_dense_form_s_map(one_thread: None) -> None:
    detector, frame = make_tiny_detector(), make_input(1500)
    inputs = [torch.from_numpy(getattr(frame, name)) for name in NAMES]
    found = with_ops(detector, HostOps())(*inputs)
    expected = dense(detector)(*inputs[:3])
    assert require_same_map(found, expected) < 1e-5
    with pytest.raises(
        M3adError, match=r"differs from the dense form's by .* of its largest value, expected at most"
    ):
        require_same_map(found * 1.01, expected)
    with pytest.raises(M3adError, match="by nan"):
        require_same_map(found * np.nan, expected)


@torch.inference_mode()
def test_no_size_depends_on_data_and_nothing_is_read_back(one_thread: None) -> None:
    # A tensor on "meta" has no values: whatever asks for one, as a CUDA graph cannot, raises.
    detector, frame = make_tiny_detector(), make_input(1500)
    for module in detector.modules().values():
        module.to("meta")
    inputs = [torch.from_numpy(getattr(frame, name)).to("meta") for name in NAMES]
    assert with_ops(detector, ShapesOnly())(*inputs).shape == (224, 224)
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):  # a read-back is noticed
        dense(detector)(*inputs[:3])


def test_forms_take_turns_and_the_first_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up = [0.0] * 6  # nobody looks how long that takes
    clock = iter([*warm_up, *np.cumsum([0.0, 1.0, 0.0, 3.0] * 20)])
    monkeypatch.setattr(graphed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    order: list[str] = []
    forms = {name: lambda name=name: order.append(name) for name in ("graph", "dense")}
    figures = measured(forms, lambda: None)
    assert order == ["graph", "dense"] * 23
    assert figures == {"graph ms": 1000.0, "dense ms": 3000.0, "dense over graph": 3.0}
