"""What torch's exporter makes of a module is the module, where its optimizer takes a small number for zero too."""

import numpy as np
import onnxruntime as ort
import torch
from m3ad.contract import Stage, Tensor
from m3ad_export.graphs.trace import dense_model
from m3ad_export.heads.map_head import GatedReconstruction

STAGE = Stage(
    "vote",
    (Tensor("scores", (4, "R"), "float32"), Tensor("scored_pixel", ("R",), "int32")),
    (
        Tensor("anomaly_map", (224, 224), "float32"),
        Tensor("score", (1,), "float32"),
        Tensor("score_maps", (6, 224, 224), "float32"),
    ),
)


def test_cmdrs_gate_of_a_map_without_differences_is_finite() -> None:
    """sigma / (mean sigma + 1e-8) is 0 there, not 0 / 0: scores of nothing but zeros, and of one tiny difference."""
    head = GatedReconstruction()
    model = dense_model(head, STAGE)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixel = np.arange(224 * 224, dtype=np.int32)
    for largest in (0.0, 1e-12):
        scores = np.zeros((4, 224 * 224), np.float32)
        scores[:, 30000:30300] = largest
        want = head(torch.from_numpy(scores), torch.from_numpy(pixel))
        found = session.run(None, {"scores": scores, "scored_pixel": pixel})
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-12)
