"""A ledger's parts judged again: which verdicts change is what two inspectors say of the same frames."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from m3ad.bundle import MANIFEST, Bundle, file_entries, write_json
from m3ad.errors import M3adError
from m3ad_client.cli import app
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.endpoints import Tls as ServerTls
from m3ad_triton.server import LocalServer
from onnx import numpy_helper
from PIL import Image
from serving import make_frame
from typer.testing import CliRunner

SEEDS = (1, 2, 3, 4, 5)
SCALE = 0.9


def scaled(bundle: Bundle, path: Path, factor: float) -> Bundle:
    """A copy whose one-class SVM's one coefficient is another: the decision w x - rho turns into factor w x - rho."""
    shutil.copytree(bundle.path, path)
    for name in ("head_vote", "head"):
        model = onnx.load(path / "onnx" / f"{name}.onnx")
        (found,) = (t for t in model.graph.initializer if t.name.endswith("svm.coefficients"))
        found.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(found) * np.float32(factor), found.name))
        onnx.save(model, path / "onnx" / f"{name}.onnx")
    write_json(path / MANIFEST, {**bundle.document, "files": file_entries(path)})
    return Bundle.open(path)


@pytest.fixture(scope="module")
def scores(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    other = scaled(tiny_bundle, tmp_path_factory.mktemp("scaled") / "tiny", SCALE)
    inspectors = {"old": Inspector(tiny_bundle, threads=1), "new": Inspector(other, threads=1)}
    return {
        name: [inspector.inspect(make_frame(seed)).score for seed in SEEDS]
        for name, inspector in inspectors.items()
    }


@pytest.fixture
def judged(
    settings: Callable[..., Path], put: Callable[..., Any], scores: dict[str, list[float]]
) -> Iterator[tuple[Station, float]]:
    """A station that judged five parts and could not judge a sixth, at a limit that the scale moves some across."""
    old, new = np.array(scores["old"]), np.array(scores["new"])
    order = np.argsort(old)
    limit = float((old[order[1]] + old[order[2]]) / 2)
    changed = (old > limit) != (new > limit)
    assert 0 < changed.sum() < len(SEEDS)
    for seed in SEEDS:
        put(seed)
    put(9, part=0.1)
    station = Station(read_config(settings(camera=f"threshold = {limit!r}")), lambda _: None)
    try:
        station.once()
        yield station, limit
    finally:
        station.close()


def run(*arguments: object) -> tuple[Result, dict[str, Any]]:
    result = CliRunner().invoke(app, ["replay", *map(str, arguments), "--json"])
    document: dict[str, Any] = json.loads(result.stdout) if result.stdout else {}
    return result, document


def test_exactly_the_changed_parts_are_found(
    judged: tuple[Station, float], tiny_bundle: Bundle, scores: dict[str, list[float]], tmp_path: Path
) -> None:
    station, limit = judged
    other = scaled(tiny_bundle, tmp_path / "other", SCALE)
    names = [part.name for part in station.ledger.parts()]
    want = {
        name: ("defect" if old > limit else "good", "defect" if new > limit else "good")
        for name, old, new in zip(names, scores["old"], scores["new"], strict=False)
        if (old > limit) != (new > limit)
    }
    ledger, out = station.ledger.path, tmp_path / "pictures"
    result, found = run(ledger, "--bundle", other.path, "--threshold", limit, "--out", out)
    assert {part["name"]: (part["old"], part["new"]) for part in found["parts"]} == want
    assert (found["replayed"], found["gone"], found["changed"]) == (len(SEEDS) + 1, 0, len(want))
    assert found["verdicts"]["fault"]["fault"] == 1
    assert isinstance(result.exception, M3adError)
    assert f"{len(want)} verdicts are other ones, at most 0 are allowed" in str(result.exception)
    moved = np.abs(np.subtract(scores["new"], scores["old"])) / limit
    assert found["score_moves"]["largest"] == pytest.approx(moved.max(), rel=1e-4)
    for part in found["parts"]:
        kept = station.ledger.part(part["part"])
        assert kept is not None
        with Image.open(part["picture"]) as both, Image.open(station.folder / str(kept.overlay)) as before:
            assert both.width == 2 * before.width + 8
            left = np.asarray(both)[: before.height, : before.width]
            np.testing.assert_array_equal(left, np.asarray(before))
    assert len(list(out.iterdir())) == len(want)
    # The same by the limits that the ledger has, and as many as there are may change.
    result, again = run(ledger, "--bundle", other.path, "--old-limits", "--at-most", len(want))
    assert result.exit_code == 0, result.exception
    assert {part["name"] for part in again["parts"]} == set(want)
    # The bundle that judged them changes nothing.
    result, same = run(ledger, "--bundle", tiny_bundle.path, "--old-limits")
    assert (result.exit_code, same["changed"]) == (0, 0)


def test_removed_frames_are_counted_and_a_running_station_is_not_held_up(
    judged: tuple[Station, float], tiny_bundle: Bundle, put: Callable[..., Any]
) -> None:
    station, _ = judged
    ledger = station.ledger
    first, second, *_ = ledger.parts()
    (station.folder / first.rgb).write_bytes(b"another picture")
    (station.folder / second.xyz).unlink()
    with station.running():
        put(8)
        result, found = run(ledger.path, "--bundle", tiny_bundle.path, "--old-limits")
        assert result.exit_code == 0, result.exception
        while len(ledger.parts("state != 'taken'")) < len(SEEDS) + 2:
            station.stop.wait(0.02)
    assert found["gone"] == 2
    assert found["changed"] == 0
    assert found["replayed"] in (len(SEEDS) - 1, len(SEEDS))  # the new part may have been in time
    result, found = run(ledger.path, "--bundle", tiny_bundle.path, "--old-limits", "--last", 1)
    assert (result.exit_code, found["replayed"], found["gone"]) == (0, 1, 0)
    text = CliRunner().invoke(
        app, ["replay", str(ledger.path), "--bundle", str(tiny_bundle.path), "--old-limits"]
    )
    assert "2 parts were left out: their frames were removed or replaced since" in " ".join(
        text.stdout.split()
    )


def test_a_server_that_speaks_tls_judges_them_again(
    judged: tuple[Station, float], fused_repository: Path, certificates: dict[str, Path]
) -> None:
    station, _ = judged
    ca, cert, key = (certificates[name] for name in ("ca", "cert", "key"))
    secured = ("--tls", "--ca", ca, "--cert", cert, "--key", key)
    with LocalServer([fused_repository], tls=ServerTls(cert=cert, key=key, ca=ca)) as server:
        result, found = run(station.ledger.path, "--url", server.grpc_url, *secured, "--old-limits")
        assert (result.exit_code, found["replayed"], found["changed"]) == (0, len(SEEDS) + 1, 0)
        result, _ = run(station.ledger.path, "--url", server.grpc_url)
        assert "speaks TLS; add --tls" in str(result.exception)


def test_what_cannot_be_judged_again_is_said(
    judged: tuple[Station, float], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    station, _ = judged
    path = station.ledger.path
    result, _ = run(path, "--bundle", tiny_bundle.path, "--camera", "right")
    assert f"{path} has no judged part of camera right; it has parts of left" in str(result.exception)
    result, _ = run(tmp_path / "none", "--bundle", tiny_bundle.path)
    assert "does not exist; a ledger is written by `m3ad-client station`" in str(result.exception)
    result, _ = run(path)
    assert result.exit_code == 2
    result, _ = run(path, "--bundle", tiny_bundle.path, "--tls")
    assert (result.exit_code, "--tls is for --url" in result.stderr) == (2, True)
    shutil.rmtree(station.folder / "frames")
    result, found = run(path, "--bundle", tiny_bundle.path)
    assert found["gone"] == len(SEEDS) + 1
    assert "none of 6 frames is there any more" in str(result.exception)
    with station.ledger.transaction() as db:
        db.execute("UPDATE part SET camera = 'right' WHERE id = 2")
    result, _ = run(path, "--bundle", tiny_bundle.path)
    assert "name one with --camera: left, right" in str(result.exception)
