"""What the heads are trained with: a contrast for MFM, cosines for MGM.

References:
    Mentor3AD Eq. 2 and 4; the contrast as M3DM codes it  https://github.com/nomewang/M3DM
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ad_export.heads.mentor import Mfm, Mgm
from m3ad_export.heads.voting import score

Fusion = Literal["frozen", "aligned"]


def info_nce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Mean cross entropy of row i of `a` finding row i of `b` among all rows, both ways: [r, D], [r, D] -> [].

    logits = cos(a_i, b_j) / temperature   (M3DM's contrast; the paper's Eq. 2 prints it without exp and log)
    """
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def align_loss(mfm: Mfm, rgb: Tensor, xyz: Tensor, temperature: float, fusion: Fusion) -> Tensor:
    """InfoNCE of the two branches (Eq. 2); with fusion `aligned` also of the mentor with each of them: -> []."""
    a, b = mfm.branches(rgb, xyz)
    loss = info_nce(a, b, temperature)
    if fusion == "aligned":
        mentor = mfm.fuse(a, b)
        loss = loss + (info_nce(mentor, a, temperature) + info_nce(mentor, b, temperature)) / 2
    return loss


def guide_loss(mfm: Mfm, mgm: Mgm, rgb: Tensor, xyz: Tensor) -> Tensor:
    """L_cos of both reconstructions, mean over the rows (Eq. 4); no gradient passes the frozen MFM: -> []."""
    with torch.no_grad():
        mentor = mfm(rgb, xyz)
    rgb_reconstructed, xyz_reconstructed = mgm(rgb, xyz, mentor)
    return score(rgb, rgb_reconstructed).mean() + score(xyz, xyz_reconstructed).mean()
