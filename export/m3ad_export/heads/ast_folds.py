"""AST's networks as they are exported: what the positions add is a constant map, gains and norms lie in the weights.

Everything is folded in float64. The log determinant is for training alone and not computed. The permutations stay a
Gather before each coupling: moved into the weights, they would make every coupling as wide as both halves.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.heads.ast import (
    CLAMP,
    CLAMP_GAIN,
    LIMIT,
    POSITIONS,
    Coupling,
    Student,
    Subnet,
    Teacher,
    grid_of,
    permutation,
)
from m3ad_export.heads.fold import fold_convolutions


def without_codes(conv: nn.Conv2d, codes: Tensor, own: slice) -> tuple[nn.Conv2d, Tensor]:
    """A convolution of the channels `own` alone, without bias, and the map that codes and bias add, [1, O, 24, 24]."""
    weight = conv.weight.detach().double()
    is_code = torch.ones(weight.shape[1], dtype=torch.bool)
    is_code[own] = False
    padding: tuple[int, ...] = (conv.kernel_size[0] // 2,) * 4
    mode = "replicate" if conv.padding_mode == "replicate" else "constant"
    assert conv.bias is not None
    constant = F.conv2d(
        F.pad(codes.double(), padding, mode=mode), weight[:, is_code], conv.bias.detach().double()
    )
    bare = nn.Conv2d(
        int((~is_code).sum()),
        conv.out_channels,
        conv.kernel_size[0],
        padding=padding[0],
        padding_mode=conv.padding_mode,
        bias=False,
    )
    bare.weight = nn.Parameter(weight[:, ~is_code].float(), requires_grad=False)
    return bare, constant.float()


class FoldedSubnet(nn.Module):
    """One half [1, C, 24, 24] -> s / 1.9 and t of the other."""

    constant: Tensor

    def __init__(self, subnet: Subnet, codes: Tensor) -> None:
        super().__init__()
        self.conv1, constant = without_codes(subnet.conv1, codes, slice(None, -POSITIONS))
        self.register_buffer("constant", constant)
        self.conv2 = copy.deepcopy(subnet.conv2)
        assert self.conv2.bias is not None
        gain = subnet.gamma.detach().double().expand(self.conv2.out_channels).clone()
        gain[: len(gain) // 2] /= CLAMP
        self.conv2.weight.data = (self.conv2.weight.double() * gain[:, None, None, None]).float()
        self.conv2.bias.data = (self.conv2.bias.double() * gain).float()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.conv2((self.conv1(x) + self.constant).relu()).chunk(2, dim=1)
        return s, t


class FoldedCoupling(nn.Module):
    """The channels before the permutation [1, C, 24, 24] -> like them, behind the coupling."""

    order: Tensor

    def __init__(self, coupling: Coupling, codes: Tensor, order: Tensor) -> None:
        super().__init__()
        self.split_at = coupling.split_at
        self.s1, self.s2 = FoldedSubnet(coupling.s1, codes), FoldedSubnet(coupling.s2, codes)
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        x = x.index_select(1, self.order)  # a Gather; indexing becomes two Transposes and a GatherND
        x1, x2 = x[:, : self.split_at], x[:, self.split_at :]
        s2, t2 = self.s2(x2)
        y1 = x1 * (CLAMP * CLAMP_GAIN * s2.atan()).exp() + t2
        s1, t1 = self.s1(y1)
        y2 = x2 * (CLAMP * CLAMP_GAIN * s1.atan()).exp() + t1
        return torch.cat([y1, y2], dim=1).clamp(-LIMIT, LIMIT)


class FoldedTeacher(nn.Module):
    """features and depth -> the teacher's latent, without its log determinant."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(
            FoldedCoupling(coupling, teacher.codes, permutation(k, teacher.channels))
            for k, coupling in enumerate(teacher.module_list.values())
            if isinstance(coupling, Coupling)
        )
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor, depth: Tensor) -> Tensor:
        x = grid_of(features, depth)
        for coupling in self.couplings:
            x = coupling(x)
        return x


class FoldedStudent(nn.Module):
    """features and depth -> the student's latent."""

    constant: Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.conv1, constant = without_codes(student.conv1, student.codes, slice(POSITIONS, None))
        self.register_buffer("constant", constant)
        self.res = fold_convolutions(student.res)
        self.conv2 = copy.deepcopy(student.conv2)
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor, depth: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(grid_of(features, depth)) + self.constant)
        for block in self.res.children():
            x = block(x)
        out: Tensor = self.conv2(x)
        return out
