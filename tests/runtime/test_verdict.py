"""A score that is no number is no verdict, in process and served alike."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import make_input
from m3ad.bundle import Bundle
from m3ad.errors import FrameError
from m3ad.limits import Limits
from m3ad_client.triton import TritonInspector
from m3ad_runtime.pipeline import Inspection, Inspector

MAP = np.zeros((224, 224), np.float32)


@pytest.mark.parametrize(("score", "is_anomalous"), [(0.4, False), (0.5, False), (0.6, True)])
def test_above_the_threshold_is_anomalous(score: float, is_anomalous: bool) -> None:
    made = Inspection.judged(np.array([score]), Limits(0.5), MAP, {}, None)
    assert (made.score, made.is_anomalous) == (score, is_anomalous)


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused(score: float) -> None:
    with pytest.raises(FrameError, match=rf"no verdict: the score is {score}, expected a finite number"):
        Inspection.judged(np.array([score], np.float32), Limits(0.5), MAP, {}, None)


def test_both_inspectors_refuse_it(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        "score": np.array([np.nan], np.float32),
        "anomaly_map": MAP,
        "score_maps": MAP[None],
    }
    here = Inspector(tiny_bundle)
    monkeypatch.setattr(here.pipeline, "run", lambda _: (values, {}))
    there = TritonInspector.__new__(TritonInspector)  # no server: only its answer matters
    there.model, there.timeout_s, there.retries, there.record = "tiny", 1.0, 0, here.record
    there.tensors, there.limits, there.doors = here.tensors, here.limits, {"tensors": "tiny_tensors"}
    answer = SimpleNamespace(as_numpy=values.__getitem__)
    there.client = SimpleNamespace(infer=lambda *_, **__: answer)
    for inspector in (here, there):
        with pytest.raises(FrameError, match="there is no verdict: the score is nan"):
            inspector.inspect_prepared(make_input(1200))
    values["score"] = np.array([0.5], np.float32)
    assert [i.inspect_prepared(make_input(1200)).is_anomalous for i in (here, there)] == [True, True]
