"""AST's networks against golden figures of the authors' modules, its orders and pads, and the folded form."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from m3ad_export.heads.ast import LatentError, Student, Teacher, grid_of, permutation, positions
from m3ad_export.heads.ast_folds import FoldedStudent, FoldedTeacher
from m3ad_export.heads.fold import fold_convolutions
from m3ad_export.nets.configs import EfficientNetConfig
from m3ad_export.nets.efficientnet import EfficientNet, MbConv, same_pads
from named_weights import assert_golden, fill, given
from torch import Tensor, nn

FEATURES, CHANNELS = 304, 368
TINY = EfficientNetConfig(
    name="tiny", stem=4, rows=((1, 3, 2, 1, 4), (2, 5, 2, 2, 4), (1, 3, 2, 2, 6), (2, 5, 2, 2, 8))
)


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    return given(1, 1, FEATURES, 24, 24), given(2, 1, 1, 192, 192)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return fill(Teacher(FEATURES))


@pytest.mark.slow
@torch.inference_mode()
def test_the_encoder_has_the_authors_figures_and_keys() -> None:
    network = fill(EfficientNet(EfficientNetConfig()))
    assert isinstance(network, EfficientNet)
    assert len(network.state_dict()) == 780
    assert sum(p.numel() for p in network.parameters()) == 17_543_204
    seen: dict[int, Tensor] = {}
    for i in (13, 35):

        def keep(_module: nn.Module, _inputs: object, output: Tensor, i: int = i) -> None:
            seen[i] = output

        network._blocks[i].register_forward_hook(keep)
    network(given(1, 1, 3, 768, 768))
    assert_golden(seen[13], -0.028687, 0.151059, (-0.070593, 0.314561, 0.146519))
    assert_golden(seen[35], -0.010986, 0.475046, (-0.285620, -0.322465, 0.263500))


def test_pads_are_those_of_456_pixels_unless_said_otherwise() -> None:
    def pads(config: EfficientNetConfig) -> list[tuple[int, int]]:
        convs = [block._depthwise_conv for block in EfficientNet(config)._blocks if isinstance(block, MbConv)]
        return [conv.pads if any(conv.pads) else (int(conv.padding[0]),) * 2 for conv in convs]

    own, actual = pads(EfficientNetConfig()), pads(EfficientNetConfig(padded_for=768))
    assert [own[i] for i in (0, 3, 8, 13, 20, 27)] == [(1, 1), (0, 1), (1, 2), (1, 1), (2, 2), (2, 2)]
    assert {i for i in range(36) if own[i] != actual[i]} == {13, 27}
    assert (actual[13], actual[27]) == ((0, 1), (1, 2))
    for size in range(5, 40):  # what SAME is: as many outputs as pixels by stride, the odd zero at the end
        for kernel, stride in ((3, 1), (3, 2), (5, 2)):
            left, right = same_pads(size, kernel, stride)
            assert right - left in (0, 1)
            assert (size + left + right - kernel) // stride + 1 == -(-size // stride)


@torch.inference_mode()
def test_the_teacher_has_the_authors_figures_and_keys(
    teacher: nn.Module, inputs: tuple[Tensor, Tensor]
) -> None:
    assert len(teacher.state_dict()) == 40
    assert sum(p.numel() for p in teacher.parameters()) == 3_890_568
    assert {k.rsplit(".", 1)[0] for k in teacher.state_dict() if "gamma" in k} == {
        f"module_list.{i}.s{j}" for i in (3, 5, 7, 9) for j in (1, 2)
    }
    begins = (
        (106, 260, 45, 26, 78),
        (301, 122, 228, 257, 102),
        (24, 151, 7, 317, 127),
        (102, 331, 240, 24, 134),
    )
    for k, begin in enumerate(begins):
        assert permutation(k, CHANNELS)[:5].tolist() == list(begin)
    z, log_det = teacher(*inputs)
    assert_golden(z, -0.351276, 18.302418, (-6.492101, -13.224110, -0.676270))
    assert_golden(log_det, -15.608266, 25.379296, (-44.387436, 2.946749, 4.399071))


@pytest.mark.slow
@torch.inference_mode()
def test_the_student_and_the_map_have_the_authors_figures(
    teacher: nn.Module, inputs: tuple[Tensor, Tensor]
) -> None:
    with torch.device("meta"):
        shapes = Student(FEATURES)
    student = fill(shapes.to_empty(device="cpu"))
    assert isinstance(student, Student)
    student.codes = positions()
    assert len(student.state_dict()) == 61
    assert sum(p.numel() for p in student.parameters()) == 82_601_329
    latent = student(*inputs)
    assert_golden(latent, -0.121888, 2.109306, (0.700858, -1.411039, -0.531232))
    mask = torch.from_numpy(np.random.default_rng(3).random((1, 1, 24, 24)).astype(np.float32))
    anomaly_map, score, score_maps = LatentError()(teacher(*inputs)[0], latent, mask)
    assert float(anomaly_map.double().mean()) == pytest.approx(114.052872, rel=1e-5)
    assert float(score) == pytest.approx(1213.6132, rel=1e-5)
    assert torch.equal(score_maps[0], anomaly_map)


@torch.inference_mode()
def test_positions_come_last_in_the_teacher_and_first_in_the_student(inputs: tuple[Tensor, Tensor]) -> None:
    """Each order written out by hand; the other one has the shapes as well and gives another latent."""
    codes, x = positions(), grid_of(*inputs)
    angle = 5 * 10000 ** (-2 / 16)  # column 5, second frequency
    torch.testing.assert_close(codes[0, 2:4, 0, 5], torch.tensor([np.sin(angle), np.cos(angle)]).float())
    torch.testing.assert_close(codes[0, 18:20, 5, 0], torch.tensor([np.sin(angle), np.cos(angle)]).float())
    assert x[0, FEATURES + 8 * 3 + 2, 10, 11] == inputs[1][0, 0, 83, 90]
    student = fill(Student(FEATURES, hidden=8))
    assert isinstance(student, Student)
    student.codes = codes
    half, order = CHANNELS // 2, permutation(0, CHANNELS)
    one = Teacher(FEATURES)
    fill(one)
    coupling = one.module_list["3"]
    x1, x2 = x[:, order[:half]], x[:, order[half:]]

    def student_of(first: Tensor, second: Tensor) -> Tensor:
        y = F.leaky_relu(student.conv1(torch.cat([first, second], dim=1)))
        for block in student.res:
            y = block(y)
        out: Tensor = student.conv2(y)
        return out

    def first_half_of(join: Callable[[Tensor], Tensor]) -> Tensor:
        s, t = coupling.s2(join(x2)).chunk(2, dim=1)  # type: ignore[operator]
        y1: Tensor = x1 * torch.exp(1.9 * 0.636 * torch.atan(s / 1.9)) + t
        return y1

    found = student(*inputs)
    torch.testing.assert_close(found, student_of(codes, x))
    assert not torch.allclose(found, student_of(x, codes), atol=0.1)
    found = coupling(x[:, order], codes)[0][:, :half]
    torch.testing.assert_close(found, first_half_of(lambda part: torch.cat([part, codes], dim=1)))
    assert not torch.allclose(found, first_half_of(lambda part: torch.cat([codes, part], dim=1)), atol=0.1)


@torch.inference_mode()
def test_folded_networks_have_the_same_values(teacher: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    assert isinstance(teacher, Teacher)
    student = fill(Student(FEATURES, hidden=16))
    assert isinstance(student, Student)
    encoder = fill(EfficientNet(TINY))
    image = given(3, 1, 3, 96, 96)
    folded = FoldedTeacher(teacher), FoldedStudent(student), fold_convolutions(encoder)
    for network in folded:
        assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    for found, expected in (
        (folded[0](*inputs), teacher(*inputs)[0]),
        (folded[1](*inputs), student(*inputs)),
        (folded[2](image), encoder(image)),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.inference_mode()
def test_the_map_is_weighed_by_the_mask_twice_and_resized_as_published() -> None:
    latents, mask = (given(4, 1, 7, 24, 24), given(5, 1, 7, 24, 24)), given(6, 1, 1, 24, 24).abs()
    found, score, _ = LatentError()(*latents, mask)
    error = (mask.double() * (latents[0].double() - latents[1].double()) ** 2).mean(dim=1, keepdim=True)
    expected = F.interpolate(error * mask.double(), scale_factor=8, mode="bicubic")[0, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.max()))
    assert float(score) == float(found.max())
