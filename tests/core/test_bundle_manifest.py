"""A bundle's manifest is data that people edit: every value is refused by a sentence unless it can be used."""

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from m3ad.bundle import Bundle, file_entry
from m3ad.errors import ArtifactError, M3adError
from m3ad.manifest import is_inside
from m3ad.rig import read_rig
from m3ad.serving import ServingRecord
from m3ad_client.cli import app as client
from m3ad_triton.cli import app as triton
from typer.testing import CliRunner


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle."""
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, path)
    return path


def edit(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text, encoding="utf-8")


def with_threshold(bundle: Bundle, value: str) -> str:
    document = {**bundle.document, "threshold": {"value": "@@"}}
    return json.dumps(document).replace('"@@"', value)


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "true", '"high"', "null", "[]", "{}"]
)
def test_a_threshold_that_is_no_finite_number_is_refused_by_every_command(
    tiny_bundle: Bundle, bundle: Path, tmp_path: Path, value: str
) -> None:
    edit(bundle, with_threshold(tiny_bundle, value))
    with pytest.raises(ArtifactError, match=r"\$\.threshold"):
        Bundle.open(bundle)
    for app, arguments in (
        (client, ["infer", str(tmp_path), "--bundle", str(bundle)]),
        (triton, ["write", str(bundle), str(tmp_path / "repository")]),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code != 0
        assert isinstance(result.exception, M3adError)
    assert not (tmp_path / "repository").exists()


def test_a_whole_number_is_a_threshold(tiny_bundle: Bundle, bundle: Path) -> None:
    edit(bundle, with_threshold(tiny_bundle, "2"))
    assert Bundle.open(bundle).manifest.threshold.value == 2.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"files": {}}, "files lists nothing"),
        ({"files": None}, "files"),
        ({"encoders": {"rgb": {"name": "x"}}}, "weights"),
        ({"dims": {"rgb_width": -1}}, "rgb_width must lie in 1"),
        ({"dims": {"rgb_width": True}}, r"\$\.dims\.rgb_width"),
        ({"dims": {"min_norm_sq": -1.0}}, "min_norm_sq"),
        ({"dims": {}}, r"missing or unknown: .*'rgb_width'.* - at `\$\.dims`"),
        ({"layouts": []}, r"\$\.layouts"),
        (
            {"layouts": ["chain", "chain"]},
            r"layouts \['chain', 'chain'\]: expected some of chain, fused, each once",
        ),
        ({"method": None}, r"\$\.method"),
        ({"method": "cflow"}, "unknown method 'cflow', expected one of mentor3ad, cfm, cmdr_iad"),
        ({"method": "cmdr_iad_rgb"}, r"layouts \['chain', 'fused'\]: expected some of chain, each once"),
        ({"method": "cfm"}, "cfm has 3 score_maps, dims 7"),
        ({"layouts": ["both"]}, "Invalid enum value 'both'"),
        ({"score_maps": ["rgb"]}, "score_maps are named"),
        ({"category": "../x"}, "is not a name"),
        ({"gate": {"passed": "yes"}}, r"\$\.gate\.passed"),
        ({"preprocessing": {}}, "preprocessing settings"),
        ({"contract_version": True}, "contract version True"),
        ({"contract_version": 2}, "contract version 2, this m3ad reads"),
    ],
)
def test_each_field_is_checked(
    tiny_bundle: Bundle, bundle: Path, change: dict[str, Any], sentence: str
) -> None:
    edit(bundle, json.dumps({**tiny_bundle.document, **change}))
    with pytest.raises(ArtifactError, match=sentence):
        Bundle.open(bundle)


def test_a_manifest_names_its_method(tiny_bundle: Bundle, bundle: Path) -> None:
    edit(bundle, json.dumps({k: v for k, v in tiny_bundle.document.items() if k != "method"}))
    with pytest.raises(ArtifactError, match="missing required field `method`"):
        Bundle.open(bundle)


@pytest.mark.parametrize("text", ["", "[", "[]", "[" * 100_000, '{"format": 1}', '"m3ad-bundle"', "9" * 5000])
def test_what_is_not_a_manifest_is_one_sentence(bundle: Path, text: str) -> None:
    edit(bundle, text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Bundle.open(bundle)


def test_files_outside_the_bundle_are_refused(tiny_bundle: Bundle, bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    files = tiny_bundle.document["files"]
    for name in ("../outside", str(outside), "onnx/../../outside", "onnx\\mfm.onnx"):
        edit(bundle, json.dumps({**tiny_bundle.document, "files": {**files, name: file_entry(outside)}}))
        with pytest.raises(ArtifactError, match="not a path inside the bundle"):
            Bundle.open(bundle)


def test_links_are_refused(tiny_bundle: Bundle, bundle: Path, tmp_path: Path) -> None:
    edit(bundle, json.dumps(tiny_bundle.document))
    Bundle.open(bundle)
    (bundle / "onnx").rename(tmp_path / "elsewhere")
    (bundle / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is a link or lies behind one"):
        Bundle.open(bundle)


def test_a_graph_the_runtime_loads_must_be_listed(tiny_bundle: Bundle, bundle: Path) -> None:
    files = {k: v for k, v in tiny_bundle.document["files"].items() if k != "onnx/head_rows.onnx"}
    edit(bundle, json.dumps({**tiny_bundle.document, "files": files}))
    with pytest.raises(ArtifactError, match=r"does not list onnx/head_rows\.onnx"):
        Bundle.open(bundle)


@given(st.text(alphabet="ab./\\\0 ", max_size=12))
def test_paths_that_are_inside_stay_inside(relative: str) -> None:
    if is_inside(relative):
        inside = Path(os.path.normpath(f"/a/folder/{relative}"))
        assert inside.relative_to("/a/folder").as_posix() == relative


def changed(document: Any, path: list[Any], value: Any) -> Any:
    """The document with another value at a place in it."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = changed(document[path[0]], path[1:], value)
    return copy


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = (
        document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    )
    return [path, *(p for key in list(keys)[:4] for p in places(document[key], (*path, key)))]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_other_value_anywhere_is_refused_by_a_sentence_or_usable(
    tiny_bundle: Bundle, bundle: Path, data: st.DataObject
) -> None:
    document = {k: v for k, v in tiny_bundle.document.items() if k != "parity"}
    place = data.draw(st.sampled_from(places(document)))
    junk = st.sampled_from([None, True, -1, 0, 10**30, 1e300, "", "x", [], {}, [None], {"a": 1}, [[[]]]])
    mutated = changed(document, list(place), data.draw(junk))
    edit(bundle, json.dumps(mutated))
    try:
        opened = Bundle.open(bundle)
    except ArtifactError:
        return
    for name in (
        "category",
        "layouts",
        "score_maps",
    ):  # taken as it is: nothing became another value or a default
        assert getattr(opened.manifest, name) == mutated[name]
    assert opened.dims.to_json() == mutated["dims"]
    assert opened.manifest.threshold.value == mutated["threshold"]["value"]
    record = ServingRecord.of(opened, opened.manifest.layouts[0])
    assert np.isfinite(record.threshold)
    assert all(entry["name"] in record.weights for entry in mutated["encoders"].values())


RIG_VALUES = ("1.5", "true", '"x"', "null", "[]", "1e999", "NaN")
FITTING = {("distance_m", "1.5"), ("coverage_limit", "1.5"), ("frames", "[]")}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pair
        for pair in itertools.product(("plane", "distance_m", "coverage_limit", "frames"), RIG_VALUES)
        if pair not in FITTING
    ],
)
def test_a_rig_of_other_types_is_one_sentence(tmp_path: Path, field: str, value: str) -> None:
    numbers = ("distance_m", "residual_m", "offset_limit_m", "tilt_limit_deg", "coverage", "coverage_limit")
    rig = {
        "format": "m3ad-rig",
        "plane": [0, 0, 1, -0.5],
        **dict.fromkeys(numbers, 0.5),
        "frames": [],
        "left_out": [],
    }
    path = tmp_path / "rig.json"
    path.write_text(json.dumps(rig))
    read_rig(path)
    path.write_text(json.dumps({**rig, field: "@@"}).replace('"@@"', value))
    with pytest.raises(ArtifactError, match="Calibrate it again"):
        read_rig(path)
