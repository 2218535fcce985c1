"""CRD's networks against golden figures of the authors' modules, their key layout, and the folded form."""

import pytest
import torch
from m3ad_export.heads.crd import SIZE, StandardisedSum, Student, raw_map
from m3ad_export.heads.fold import fold_convolutions
from m3ad_export.nets.configs import WideResNetConfig
from m3ad_export.nets.wide_resnet import WideResNet
from named_weights import assert_golden, fill, given
from scipy.ndimage import gaussian_filter
from torch import nn

SHAPES = ((1, 256, 64, 64), (1, 512, 32, 32), (1, 1024, 16, 16))
TINY = WideResNetConfig(name="tiny", stem=8, inner=8, blocks=(1, 2, 1))


def levels(first_seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> tuple[torch.Tensor, ...]:
    return tuple(given(first_seed + i, *shape) for i, shape in enumerate(shapes))


def tiny_levels(first_seed: int, config: WideResNetConfig = TINY) -> tuple[torch.Tensor, ...]:
    shapes = tuple((1, c, side, side) for c, side in zip(config.channels, (64, 32, 16), strict=True))
    return levels(first_seed, shapes)


@torch.inference_mode()
def test_the_teacher_has_the_authors_figures_and_keys() -> None:
    teacher = fill(WideResNet(WideResNetConfig()))
    first, _, third = teacher(given(1, 1, 3, 256, 256))
    assert_golden(first, 1.431839, 1.514021, (0.326891, 1.111665, 1.956956))
    assert_golden(third, 3.810202, 4.006517, (0, 4.988518, 0.558664))
    assert len(teacher.state_dict()) == 258
    assert sum(p.numel() for p in teacher.parameters()) == 24_862_528


@pytest.mark.slow
@torch.inference_mode()
def test_the_student_has_the_authors_figures_and_keys() -> None:
    with torch.device("meta"):
        student = Student(WideResNetConfig())
    student = fill(student.to_empty(device="cpu"))
    for norm in (m for m in student.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.num_batches_tracked.zero_()
    assert len(student.state_dict()) == 465
    assert sum(p.numel() for p in student.parameters()) == 193_356_806
    counts = {name: len(part.state_dict()) for name, part in student.named_children()}
    assert counts == {"bn": 84, "decoder": 255, "projector_filter": 72, "projector_amply": 54}
    x, y = levels(10), levels(20)
    made = student.rebuild(x, y)
    assert_golden(made.filtered[0], 0.076317, 0.119255, (0.012692, 0, 0))
    assert_golden(made.amplified[1], 0.290379, 0.438665, (0, 0, 1.253943))
    assert_golden(made.mixed[0], 0.488998, 0.428211, (0.122048, 1.052435, 0))
    assert_golden(made.mixed[2], 0.360679, 0.364902, (0, 0, 0.345216))
    assert_golden(raw_map(x, made.mixed), 3.002353, 0.053644, (2.868686, 3.144597, 3.033803))


@torch.inference_mode()
def test_folded_networks_have_no_norms_and_the_same_values() -> None:
    teacher, student = fill(WideResNet(TINY)), fill(Student(TINY))
    image, x, y = given(1, 2, 3, 256, 256), tiny_levels(10), tiny_levels(20)
    for network, inputs in ((teacher, (image,)), (student, (*x, *y))):
        folded = fold_convolutions(network)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
        for found, expected in zip(folded(*inputs), network(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.inference_mode()
def test_the_map_is_the_published_one() -> None:
    """Upsampled, standardised, added and smoothed by SciPy, one step after the other in float64."""
    vote = StandardisedSum()
    vote.mean, vote.std = torch.tensor([1.5, 2.5]), torch.tensor([0.3, 0.7])
    x, mixed = [tiny_levels(s) for s in (1, 2)], [tiny_levels(s) for s in (3, 4)]
    found, score, maps = vote(*x[0], *x[1], *mixed[0], *mixed[1])
    single = [
        (raw_map(tuple(t.double() for t in a), tuple(t.double() for t in b))[0].numpy() - mean) / std  # type: ignore[arg-type]
        for a, b, mean, std in zip(x, mixed, (1.5, 2.5), (0.3, 0.7), strict=True)
    ]
    expected = gaussian_filter(single[0] + single[1], sigma=4)
    assert found.shape == (SIZE, SIZE)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=2e-5)
    for part, alone in zip(maps, single, strict=True):
        torch.testing.assert_close(
            part.double(), torch.from_numpy(gaussian_filter(alone, 4)), rtol=0, atol=2e-5
        )
    assert float(score) == float(found.max())
