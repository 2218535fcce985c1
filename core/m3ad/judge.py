"""What makes a part not good: the one implementation, for inspections in process, by clients and by servers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from m3ad.defects import Defect, find_defects
from m3ad.frame_settings import Preprocessing
from m3ad.limits import Limits, verdict
from m3ad.preprocess import geometry


def defects_of(
    anomaly_map: npt.NDArray[np.float32],
    score: float,
    score_maps: npt.NDArray[np.float32],
    names: Sequence[str],
    xyz: npt.NDArray[np.float32],
    preprocessing: Preprocessing,
    limits: Limits,
) -> list[Defect]:
    """The regions of a part's map above the lower limit; none of a good part.

    Where a method scales the score, the limit is brought to the map by the same factor: limit max(map) / score.

    Args:
        anomaly_map: [224, 224].
        score: of the part.
        score_maps: [n, 224, 224].
        names: of the score maps.
        xyz: [H, W, 3] metres, as the frame came.
        preprocessing: says which points of it are holes.
        limits: of the verdict.
    """
    if verdict(score, limits) == "good":
        return []
    level = limits.lowest
    if score > 0:
        level *= float(anomaly_map.max()) / score
    return find_defects(
        anomaly_map, level, geometry(xyz, preprocessing), score_maps, names, preprocessing.geometry
    )
