"""Attention as one node: the tokens of PyTorch in double precision, and no other form is taken for it."""

import copy
from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from conftest import TINY_RGB, TINY_XYZ, randomise
from m3ad.bundle import Bundle
from m3ad.contract import IMAGE_SIZE, Stage, Tensor
from m3ad_calibrate import qdq
from m3ad_export.graphs.fused_attention import NODE, fused_attention
from m3ad_export.graphs.plan import PlanPrecision, default_plan
from m3ad_export.graphs.precision import half_model
from m3ad_export.graphs.surgery import edited
from m3ad_export.graphs.trace import dense_model
from m3ad_export.nets.vit import VisionTransformer
from m3ad_runtime.onnx_graph import OnnxGraph
from torch import nn


def nodes(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    net = VisionTransformer(TINY_RGB)
    randomise(net, 3)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(net: nn.Module) -> onnx.ModelProto:
    image = Tensor("image", (1, 3, IMAGE_SIZE, IMAGE_SIZE))
    tokens = Tensor("rgb_tokens", (TINY_RGB.side**2, TINY_RGB.token_width))
    return dense_model(net, Stage("rgb_extractor", (image,), (tokens,)))


def test_every_attention_is_one_node_with_the_same_tokens(net: nn.Module, model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    fused = fused_attention(model)
    assert model.SerializeToString() == before
    assert nodes(fused)[NODE] == nodes(model)["Softmax"] == max(TINY_RGB.blocks) + 1
    assert not nodes(fused)["Softmax"]
    image = np.random.default_rng(0).normal(size=(1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    exact = copy.deepcopy(net).double()(torch.from_numpy(image).double()).numpy()
    one, parts = (OnnxGraph(m.SerializeToString(), 1)({"image": image})["rgb_tokens"] for m in (fused, model))
    assert np.abs(one - exact).max() <= 1e-5 * np.abs(exact).max()
    assert np.abs(one - exact).mean() <= 1.1 * np.abs(parts - exact).mean()


def test_the_cpus_graph_has_it_and_the_engines_has_not(tiny_bundle: Bundle) -> None:
    of = {
        n: nodes(onnx.load(tiny_bundle.file(f"onnx/{n}.onnx"))) for n in ("xyz_encoder_cpu", "xyz_extractor")
    }
    blocks = max(TINY_XYZ.blocks) + 1
    assert of["xyz_encoder_cpu"][NODE] == of["xyz_extractor"]["Softmax"] == blocks
    assert of["xyz_extractor"][NODE] == of["xyz_encoder_cpu"]["Softmax"] == 0


def test_eight_bits_around_it_stay(model: onnx.ModelProto) -> None:
    plan = default_plan("int8")
    prepared = qdq.prepared(model, "rgb_extractor", plan)
    limits = dict.fromkeys(qdq.activations(prepared, "rgb_extractor", plan), 4.0)
    whole = qdq.quantized(prepared, "rgb_extractor", plan, limits)
    fused = fused_attention(whole)
    assert nodes(fused)[NODE] == nodes(model)["Softmax"]
    for op in ("DequantizeLinear", "QuantizeLinear"):
        assert nodes(fused)[op] == nodes(whole)[op] > 0
    image = np.random.default_rng(0).normal(size=(1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    found, expected = (
        OnnxGraph(m.SerializeToString(), 1)({"image": image})["rgb_tokens"] for m in (fused, whole)
    )
    # What rounds to another step of eight bits does so by one step.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_types_stay_in_parts(model: onnx.ModelProto, precision: PlanPrecision) -> None:
    """ONNX Runtime has no such kernel on a CPU, and the casts between say where a GPU rounds."""
    half = half_model(model, "rgb_extractor", default_plan(precision))
    assert nodes(fused_attention(half)) == nodes(half)


def spoil_scale(graph: gs.Graph) -> None:
    mul = next(n for n in graph.nodes if n.op == "Softmax").i(0).i(0)
    mul.inputs[1] = gs.Constant(
        "of each channel", np.full((1, 1, 1, mul.inputs[0].shape[-1]), 0.5, np.float32)
    )


def spoil_order(graph: gs.Graph) -> None:
    softmax = next(n for n in graph.nodes if n.op == "Softmax")
    product, values = softmax.i(0), softmax.o(0)
    key = product.inputs[1].inputs[0].inputs[0]
    product.inputs[1].inputs[0].inputs[0], values.inputs[1] = values.inputs[1], key


def spoil_mask(graph: gs.Graph) -> None:
    softmax = next(n for n in graph.nodes if n.op == "Softmax")
    masked = gs.Variable("masked", np.float32)
    mask = gs.Constant("mask", np.zeros((1, 1, 1, softmax.inputs[0].shape[-1]), np.float32))
    graph.nodes.insert(
        graph.nodes.index(softmax),
        gs.Node("Add", "mask/Add", inputs=[softmax.inputs[0], mask], outputs=[masked]),
    )
    softmax.inputs[0] = masked


@pytest.mark.parametrize("spoil", [spoil_scale, spoil_order, spoil_mask])
def test_another_form_stays_in_parts(model: onnx.ModelProto, spoil: object) -> None:
    assert callable(spoil)
    other = edited(onnx.shape_inference.infer_shapes(model), spoil)
    assert nodes(fused_attention(other))[NODE] == nodes(model)["Softmax"] - 1
