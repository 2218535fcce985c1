"""Shape-Guided's dictionaries: a feature as a few of its neighbours among good parts', and what is left of it.

References:
    Shape-Guided (Chu et al., ICML 2023)  https://github.com/jayliu0313/Shape-Guided (no licence: written anew)
Everything is of standard operations whose sizes follow from the frame's alone: a choice of rows is a mask.
"""

import torch
from m3ad.contract import IMAGE_SIZE
from m3ad.methods.shape_guided import CELL_SIDE, CELLS
from torch import Tensor, nn
from torch.nn import functional as F

from m3ad_export.heads.axis_map import AxisMap, operator
from m3ad_export.heads.bank import CHUNK_ROWS
from m3ad_export.heads.fold import fold_convolutions
from m3ad_export.heads.map_head import pil4, up
from m3ad_export.nets.wide_resnet import WideResNet

ATOMS = 3  # of a sparse code
SHAPE_NEIGHBORS, RGB_NEIGHBORS = 10, 5
MORE = 3  # candidates that are measured again beside those that are wanted
SHIFTS = (
    -2 * CELL_SIDE,
    -2,
    2,
    2 * CELL_SIDE,
)  # from the cells of a patch's pixels to those that belong to it
DEPENDENT = 1e-5  # of an atom's length: what is shorter beside the chosen ones adds nothing
MASKED = 1e30  # a distance that is never chosen


def level_pooling(side: int) -> Tensor:
    """AvgPool(3, stride 1, no padding), then AdaptiveAvgPool to 28: [28, side] float64."""

    def op(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(F.avg_pool1d(x[None], 3, stride=1), CELL_SIDE)[0]

    return operator(op, side)


class RgbRows(nn.Module):
    """image [1, 3, 224, 224] -> rgb_rows [784, C1 + C2]: two levels of the network, pooled to 28 x 28 each."""

    def __init__(self, network: WideResNet) -> None:
        super().__init__()
        folded = fold_convolutions(network)
        parts = ("conv1", "maxpool", "layer1", "layer2")
        self.stem, self.maxpool, self.layer1, self.layer2 = (folded.get_submodule(name) for name in parts)
        self.pool1, self.pool2 = AxisMap(level_pooling(56)), AxisMap(level_pooling(28))

    def forward(self, image: Tensor) -> Tensor:
        first = self.layer1(self.maxpool(self.stem(image).relu()))
        levels = self.pool1(first[0]), self.pool2(self.layer2(first)[0])
        return torch.cat(levels).flatten(1).T


def residual(queries: Tensor, offsets: Tensor) -> Tensor:
    """What orthogonal matching pursuit with three atoms leaves: q [Q, D], its atoms less q [Q, K, D] -> q - f~ [Q, D].

    Each step takes the atom of the largest |<d, r>|, its length left as it is, and takes from r its part in the span of
    the chosen ones: least squares on them, without their coefficients. One that depends on the others takes nothing.
    Neighbours are much alike: <d, r> = <q, r> + <d - q, r> is compared by the second term alone, which is not rounded
    to the size of the first, so that any runtime takes the same atom.
    """
    left = queries
    basis: list[Tensor] = []
    for _ in range(ATOMS):
        common = (queries * left).sum(dim=1, keepdim=True)
        fit = (offsets @ left[:, :, None])[:, :, 0]
        positive = common + fit.amax(dim=1, keepdim=True) >= -(common + fit.amin(dim=1, keepdim=True))
        best = torch.where(positive, fit, -fit).argmax(dim=1)[:, None, None]
        atom = offsets.gather(1, best.expand(-1, 1, offsets.shape[2]))[:, 0] + queries
        rest = atom
        for _again in range(2):  # once more for what rounding left
            for each in basis:
                rest = rest - (rest * each).sum(dim=1, keepdim=True) * each
        remains, whole = (v.square().sum(dim=1, keepdim=True).sqrt() for v in (rest, atom))
        counts = (remains > DEPENDENT * whole).float()
        unit = rest * (counts / (remains + (1 - counts)))
        basis.append(unit)
        left = left - (left * unit).sum(dim=1, keepdim=True) * unit
    return left


class Memory(nn.Module):
    """Rows of good parts [B, D]; the nearest of each query are measured directly among a few more candidates.

    Args:
        rows: at least as many as are asked for.
    """

    mean: Tensor  # [D]
    rows: Tensor  # [B, D] less the mean, which changes no distance
    half_norms: Tensor  # [B]

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        mean = rows.float().mean(dim=0)
        centred = rows.float() - mean
        self.register_buffer("mean", mean)
        self.register_buffer("rows", centred)
        self.register_buffer("half_norms", 0.5 * centred.square().sum(dim=1))

    def nearest(self, queries: Tensor, count: int, barred: Tensor | None = None, skip: int = 0) -> Tensor:
        """Index [Q, count] of the nearest rows, the nearest first.

        Args:
            queries: [Q, D].
            count: of the rows.
            barred: [B], MASKED where a row may not be chosen and 0 elsewhere.
            skip: how many of the nearest are left out: a part that is in the memory finds itself.
        """
        centred = queries - self.mean
        total = len(self.rows)
        wanted = min(count + skip + MORE, total)
        scores, indices = [], []
        for start in range(0, total, CHUNK_ROWS):
            part = slice(start, min(start + CHUNK_ROWS, total))
            whole = total <= CHUNK_ROWS  # a slice would be written into the graph beside the rows
            rows, norms = (self.rows, self.half_norms) if whole else (self.rows[part], self.half_norms[part])
            product = F.linear(centred, rows, -norms)
            best = (product if barred is None else product - barred[part]).topk(
                min(wanted, part.stop - start), dim=1
            )
            scores.append(best.values)
            indices.append(best.indices + start)
        joined = torch.cat(indices, dim=1)
        candidates = joined.gather(1, torch.cat(scores, dim=1).topk(wanted, dim=1).indices)
        distance = (centred[:, None] - F.embedding(candidates, self.rows)).square().sum(dim=2)
        if barred is not None:
            distance = distance + F.embedding(candidates, barred[:, None])[:, :, 0]
        chosen = distance.topk(count + skip, dim=1, largest=False).indices[:, skip:]
        return candidates.gather(1, chosen)

    def left_of(self, queries: Tensor, nearest: Tensor) -> Tensor:
        """What the chosen rows do not make of each query: [Q, D]."""
        return residual(queries, F.embedding(nearest, self.rows) - (queries - self.mean)[:, None])


def cells_of(pixel: Tensor) -> Tensor:
    """The cell of 8 x 8 pixels that each pixel lies in: row-major pixels of any shape -> cells, int64."""
    side = IMAGE_SIZE // CELL_SIDE
    row, column = pixel.long() // IMAGE_SIZE, pixel.long() % IMAGE_SIZE
    return row // side * CELL_SIDE + column // side


def shifted(marks: Tensor) -> Tensor:
    """Cells two rows or two columns from the marked ones, [n, 784] of 0 and 1 -> the same.

    As published the shift is one of the index, so that columns run on in the next row, and the marked cells themselves
    are not among them. Published, an index beyond the grid becomes one that the list has already: it falls away.
    """
    zeros = marks.new_zeros(len(marks), SHIFTS[-1])
    padded = torch.cat([zeros, marks, zeros], dim=1)
    moved = [padded[:, SHIFTS[-1] - by : SHIFTS[-1] - by + CELLS] for by in SHIFTS]
    return torch.stack(moved).amax(dim=0)


class GuidedDictionary(nn.Module):
    """codes [G, E], rgb_rows [784, C], knn_idx [G, S], point_pixel [N] -> rebuilt codes, residual [784], largest [2].

        f~ = sum of 3 of its 10 nearest codes (least squares),  r = |f - f~|,  largest = (max r_rgb, max r_sdf)

    The cells of the image that belong to a patch are rebuilt likewise, 3 of 5, from cells of good images that belong
    to the patches found; others have no residual. RGB rows come from all frames, each with its place.

    Args:
        codes: [B, E] of good patches.
        rgb: [K, C] of good images.
        frame: [B], which of the M frames each code is of.
        marks: [B, 784], 1 where a cell belongs to the patch.
        place: [K], frame x 784 + cell of each row.
        frames: M.
    """

    frame: Tensor
    marks: Tensor
    place: Tensor

    def __init__(
        self, codes: Tensor, rgb: Tensor, frame: Tensor, marks: Tensor, place: Tensor, frames: int
    ) -> None:
        super().__init__()
        self.shape, self.rgb = Memory(codes), Memory(rgb)
        self.register_buffer("frame", frame.long())
        self.register_buffer("marks", marks.bool())
        self.register_buffer("place", place.long())
        self.frames = frames

    def barred(self, guides: Tensor) -> Tensor:
        """[K], MASKED for the RGB rows that belong to none of the found patches [n]."""
        of_frame = torch.arange(self.frames, device=guides.device)[:, None] == self.frame.index_select(
            0, guides
        )
        hits = of_frame.float() @ self.marks.index_select(0, guides).float()
        return (hits.reshape(-1).index_select(0, self.place) == 0).float() * MASKED

    def forward(
        self, codes: Tensor, rgb_rows: Tensor, knn_idx: Tensor, point_pixel: Tensor, skip: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        guides = self.shape.nearest(codes, SHAPE_NEIGHBORS, skip=skip)
        code_left = self.shape.left_of(codes, guides)
        seen = own_cells(knn_idx, point_pixel).amax(dim=0)
        nearest = self.rgb.nearest(rgb_rows, RGB_NEIGHBORS, self.barred(guides.reshape(-1)), skip)
        rgb_residual = length(self.rgb.left_of(rgb_rows, nearest)) * seen
        largest = torch.cat([x[None].amax(dim=1) for x in (rgb_residual, length(code_left))])
        return codes - code_left, rgb_residual, largest


def own_cells(knn_idx: Tensor, point_pixel: Tensor) -> Tensor:
    """The cells that belong to each patch, as 0 and 1: knn_idx [G, S], point_pixel [N] -> [G, 784] float32."""
    cells = cells_of(point_pixel.index_select(0, knn_idx.reshape(-1))).reshape(knn_idx.shape)
    marks = torch.zeros(len(knn_idx), CELLS, device=cells.device)
    return shifted(marks.scatter(1, cells, torch.ones(cells.shape, device=cells.device)))


def length(rows: Tensor) -> Tensor:
    """|x| of each row: [n, D] -> [n]."""
    return rows.square().sum(dim=1).sqrt()


class GuidedVote(nn.Module):
    """distance [G, S], knn_idx [G, S], point_pixel [N], rgb_residual [784], largest [2] -> map, score, score_maps.

        m = f(max(max(0, a M_rgb + b), M_sdf)),   score = max r_sdf x max r_rgb

    M_sdf is the smallest distance over the patches that cover a pixel, 0 where none does; M_rgb the residual upsampled
    bilinearly; f is PIL's blur of 4 without its 8 bits. `line` = (a, b) puts M_rgb into the range of M_sdf. The score
    maps are both terms, blurred.
    """

    MAPS = ("rgb", "xyz")
    line: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.blur = AxisMap(up(CELL_SIDE, IMAGE_SIZE)), AxisMap(pil4())
        self.register_buffer("line", torch.tensor([1.0, 0.0]))

    def raw_maps(
        self, distance: Tensor, knn_idx: Tensor, point_pixel: Tensor, rgb_residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """M_rgb and M_sdf, not blurred: [1, 224, 224] each."""
        # Of the pixels' own size: torch's exporter writes the example's number of points into a tensor that is made.
        nothing = (point_pixel * 0).to(distance.dtype) + MASKED
        by_point = nothing[None].repeat(len(distance), 1).scatter(1, knn_idx.long(), distance)
        smallest = by_point.amin(dim=0)
        at_points = torch.where(smallest < MASKED, smallest, torch.zeros_like(smallest))
        grid = distance.new_zeros(IMAGE_SIZE * IMAGE_SIZE).index_put((point_pixel.long(),), at_points)
        side = (1, IMAGE_SIZE, IMAGE_SIZE)
        return self.up(rgb_residual.reshape(1, CELL_SIDE, CELL_SIDE)), grid.reshape(side)

    def forward(
        self,
        distance: Tensor,
        knn_idx: Tensor,
        point_pixel: Tensor,
        rgb_residual: Tensor,
        largest_residuals: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rgb, sdf = self.raw_maps(distance, knn_idx, point_pixel, rgb_residual)
        rgb = (self.line[:1].reshape(1, 1, 1) * rgb + self.line[1:].reshape(1, 1, 1)).clamp_min(0)
        maps = self.blur(torch.cat([rgb, sdf, torch.maximum(rgb, sdf)]))
        return maps[2], largest_residuals[:1] * largest_residuals[1:], maps[:2]


def line_between(rgb: Tensor, sdf: Tensor) -> Tensor:
    """(a, b) so that mean +- 3 std of a rgb + b are those of sdf, over the pixels that are not 0; maps of any shape."""
    (rgb_mean, rgb_std), (sdf_mean, sdf_std) = (
        (x[x != 0].double().mean(), x[x != 0].double().std(correction=0)) for x in (rgb, sdf)
    )
    # sdf_low - a rgb_low with low = mean - 3 std, in which the 3 cancels
    a = sdf_std / rgb_std
    return torch.stack([a, sdf_mean - a * rgb_mean]).float()
