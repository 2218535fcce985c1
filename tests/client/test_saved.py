"""Saved results that somebody edited or mixed up: a sentence that names the entry, never a traceback."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.errors import ArtifactError
from m3ad_client import report
from m3ad_client.measure import run_bench
from m3ad_client.saved import read_result
from m3ad_runtime.worker import INFERENCE_ONLY
from test_candidates import SAMPLE, Form

METRICS = {"image_auroc": 1.0, "pixel_auroc": 0.5}
EVALUATION = {
    "category": "tiny [v2]",
    "split": "test",
    "weights": "w",
    "threshold": 0.5,
    "frames": 2,
    "metrics": METRICS,
    "per_defect": {"bump": {"frames": 1, **METRICS}},
    "verdicts": {"found": 1, "missed": 0, "false_alarms": 0, "passed": 1},
    "score_maps": {"rgb": METRICS},
    "without_mask": {},
}


def bench() -> dict[str, Any]:
    found = run_bench([Form("a"), Form("b", regions=(INFERENCE_ONLY,))], [SAMPLE], frames=2, warmup=1)
    found["artefacts"] = {
        "export_s": 1.0,
        "onnx_bytes": 2,
        "engines": {"sm89": {"precision": "fp16", "build_s": 1, "bytes": 3}},
    }
    return json.loads(json.dumps(found))


BENCH = bench()


def show(document: Any, path: Path) -> str:
    """What `report` prints of a document."""
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    result = read_result(path)
    tables = report.bench_tables([result]) if "rows" in result else report.eval_tables(result)
    for table in tables:
        table.to_rich()
    return "\n".join(table.to_markdown() for table in tables)


def test_kinds_without_masks_have_no_metrics_by_pixel(tmp_path: Path) -> None:
    bare = {**EVALUATION["per_defect"], "scratch": {"frames": 3, "image_auroc": 0.75}}
    told = show({**EVALUATION, "per_defect": bare, "without_mask": {"scratch": 2}}, tmp_path / "eval.json")
    assert "| image auroc | 1.0000 | 1.0000 | 0.7500 |" in told
    assert "| pixel auroc | 0.5000 | 0.5000 |  |" in told
    assert "no mask marks a defect on 2 of 3 frames of `scratch`; metrics by pixel leave them out" in told
    with pytest.raises(ArtifactError, match="`per_defect` `scratch` has no `pixel_auroc`"):
        show({**EVALUATION, "per_defect": bare}, tmp_path / "eval.json")
    with pytest.raises(ArtifactError, match="`without_mask` names `dent`, which `per_defect` has not"):
        show({**EVALUATION, "without_mask": {"dent": 1}}, tmp_path / "eval.json")


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    assert "| b | inference only: tensors ready -> map |" in show(BENCH, tmp_path / "bench.json")
    told = show(EVALUATION, tmp_path / "eval.json")
    assert "**tiny [v2], split test (w)**" in told
    assert "| image auroc | 1.0000 | 1.0000 |" in told


def test_energy_is_shown_or_why_it_is_not(tmp_path: Path) -> None:
    energy = {"a": {"source": "tegrastats", "frames": 5, "watts": 12.34, "joules_per_frame": 1.5}}
    told = show({**BENCH, "energy": energy, "energy_not_measured": None}, tmp_path / "bench.json")
    assert "| a | 1.50 | 12.3 | 5 | tegrastats |" in told
    missing = {"energy": {}, "energy_not_measured": "neither tegrastats nor NVML is on this machine"}
    told = show({**BENCH, **missing}, tmp_path / "bench.json")
    assert "- energy is not measured: neither tegrastats nor NVML is on this machine" in told


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"metrics": {}}, "missing required field `category`"),
        ({"rows": [1], "ratios": {}, "paper": {}}, r"got `int` - at `\$\.rows\[0\]`"),
        ({"rows": [{}], "ratios": {}, "paper": {}}, r"missing required field `name` - at `\$\.rows\[0\]`"),
        ({"rows": 1, "ratios": {}, "paper": {}}, r"got `int` - at `\$\.rows`"),
        ({**BENCH, "paper": []}, r"got `array` - at `\$\.paper`"),
        ({**BENCH, "ratio_spread": {}}, "`ratio_spread` lacks `b/a`, which `ratios` has"),
        ({**BENCH, "ratios": {"b/a": float("nan")}}, r"nan is not a finite number - at `\$\.ratios\.b/a`"),
        (
            {**BENCH, "paper": {**BENCH["paper"], "rows": [[1]]}},
            r"`rows` are not all of its 7 columns - at `\$\.paper`",
        ),
        (
            {**BENCH, "artefacts": {"export_s": 1}},
            r"missing required field `onnx_bytes` - at `\$\.artefacts`",
        ),
        ({**BENCH, "artefacts": None}, r"got `null` - at `\$\.artefacts`"),
        ({**BENCH, "ratios": {"a\x1b[2J": 1}}, r"matching regex .* - at `key` in `\$\.ratios`"),
        ({**EVALUATION, "frames": True}, r"got `bool` - at `\$\.frames`"),
        ({**EVALUATION, "threshold": 10**400}, r"out of range - at `\$\.threshold`"),
        ({**EVALUATION, "category": "\ud800"}, "half of a surrogate pair"),
        ({**EVALUATION, "category": "\x1b[2J"}, r"matching regex .* - at `\$\.category`"),
        ({**EVALUATION, "per_defect": {"bump": {"frames": 1}}}, "`per_defect` `bump` has no `image_auroc`"),
        ({**EVALUATION, "metrics": None}, r"got `null` - at `\$\.metrics`"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"rows": 9' + "9" * 5000 + "}", "is not valid JSON"),
        ("[]", "is not a result of `m3ad-client eval --json` or `bench --json`"),
    ],
)
def test_a_damaged_result_is_one_sentence(document: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message) as refused:
        show(document, tmp_path / "r.json")
    assert str(tmp_path / "r.json") in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("source", [BENCH, EVALUATION])
@given(data=st.data(), value=JSON, drop=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_wrong_value_anywhere_is_a_sentence_or_shown(
    tmp_path_factory: pytest.TempPathFactory,
    source: dict[str, Any],
    data: st.DataObject,
    value: Any,
    drop: bool,
) -> None:
    document = copy.deepcopy(source)
    place: Any = document
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if drop:
        del place[key]
    else:
        place[key] = value
    path = tmp_path_factory.getbasetemp() / f"{os.getpid()}.json"
    refused = sentence_of(lambda: show(document, path))
    assert refused is None or str(path) in refused


def sentence_of(use: Callable[[], object]) -> str | None:
    try:
        use()
    except ArtifactError as error:
        return str(error)
    return None
