"""Several categories in one server: shared stages, and a category that is replaced while clients ask."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from m3ad.bundle import Bundle, file_entries, write_json
from m3ad.errors import ArtifactError, ServerError
from m3ad.serving import stage_named
from m3ad_client.triton import TritonInspector
from m3ad_runtime.pipeline import Inspector
from m3ad_triton import cli
from m3ad_triton.categories import find_repositories, write_categories
from m3ad_triton.golden import Golden
from m3ad_triton.memory import server_memory
from m3ad_triton.reload import Control, ask_server
from m3ad_triton.repository import Repository, write_repository
from m3ad_triton.served import ServedModels
from m3ad_triton.server import LocalServer
from serving import make_frame, renamed


def another_head(bundle: Path) -> None:
    """Give a bundle's head other bytes and the same numbers, as if it was trained for this category alone."""
    graph = bundle / "onnx" / "head_vote.onnx"
    # A string field of the model (domain, number 4) may come again: the last counts.
    graph.write_bytes(graph.read_bytes() + b"\x22\x01x")
    rehash_bundle(bundle)


def rehash_bundle(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    write_json(bundle / "manifest.json", {**manifest, "files": file_entries(bundle)})


@pytest.fixture
def bundles(tiny_bundle: Bundle, tmp_path: Path) -> list[Path]:
    """Three categories with the same extractors, the first of which has a head of its own."""
    paths = [renamed(tiny_bundle, name, tmp_path / "bundles") for name in ("left", "right", "top")]
    another_head(paths[0])
    return paths


def state_of(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    """What a change of a file would change: when it or its entry was changed last, and its content."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {p: (p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.read_bytes()) for p in paths}


def test_equal_stages_are_one_model(bundles: list[Path], tmp_path: Path) -> None:
    repositories = write_categories(bundles, tmp_path / "line", "onnxruntime")
    assert find_repositories([tmp_path / "line"]) == [tmp_path / "line" / n for n in ("left", "right", "top")]
    weights = [r.path / f"{r.manifest.category}_rgb_extractor/1/rgb_extractor.onnx" for r in repositories]
    assert len({path.stat().st_ino for path in weights}) == 1
    models = ServedModels(tmp_path, repositories)
    steps = ("prepare", "admit", "judge")  # queues are each category's own, gates are not
    own = {f"{category}_{step}" for category in ("left", "right", "top") for step in steps}
    doors = {f"{category}{door}" for category in ("left", "right", "top") for door in ("", "_tensors")}
    stages = ("rgb_extractor", "xyz_extractor", "head", "gate", "tensor_gate")
    shared = {f"shared_{stage}" for stage in stages}
    assert {path.name for path in models.folder.iterdir()} == {*own, *doors, *shared, "left_head"}
    assert models.names() == {path.name for path in models.folder.iterdir()}
    # Neither a second server nor a repository that is written anew changes anything of it; Triton looks at these times.
    served = state_of(models.folder)
    (tmp_path / "second").mkdir()
    ServedModels(tmp_path / "second", repositories)
    write_repository(renamed(Bundle.open(bundles[1]), "left", tmp_path), repositories[0].path, "onnxruntime")
    assert state_of(models.folder) == served
    proposal = models.propose(Repository.open(repositories[0].path))
    assert proposal.names["left_head"] == "shared_head"
    assert proposal.trial == "left_tensors.2"
    models.sweep()
    assert models.names() == {path.name for path in models.folder.iterdir()}


def test_the_stage_of_a_served_model() -> None:
    assert (
        stage_named("a_head", "a")
        == stage_named("shared_head", "a")
        == stage_named("a_head.3", "a")
        == "head"
    )
    assert stage_named("shared_line_head", "shared_line") == "head"
    assert stage_named("a.b_head.2", "a.b") == "head"


def test_several_bundles_are_written_into_a_folder_of_repositories_alone(
    bundles: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="are both of category left, and one server holds one of a name"):
        write_categories([bundles[0], bundles[0].parent / "left"], tmp_path / "line", "onnxruntime")
    (tmp_path / "line" / "mine").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="line holds mine, which is no repository"):
        write_categories(bundles, tmp_path / "line", "onnxruntime")
    assert [path.name for path in (tmp_path / "line").iterdir()] == ["mine"]


def test_a_golden_answer_is_compared(fused_repository: Path) -> None:
    repository = Repository.open(fused_repository)
    golden = Golden.read(repository.path, repository.manifest)
    answer = {name: array.copy() for name, array in golden.answer.items()}
    assert golden.difference(answer) is None
    answer["anomaly_map"][3, 4] += 2e-4
    assert golden.difference(answer) == "`anomaly_map` differs from the bundle's by 0.0002, allowed is 0.0001"
    answer["anomaly_map"][3, 4] = np.nan
    assert "differs from the bundle's by nan" in str(golden.difference(answer))


def test_nobody_serves_it(fused_repository: Path) -> None:
    with pytest.raises(ServerError, match=r"no server of this machine and user serves .*: m3ad-triton serve"):
        ask_server(fused_repository, 5)


@contextmanager
def asked_all_the_time(url: str, category: str, clients: int) -> Iterator[list[tuple[float, str]]]:
    """Clients that inspect one frame again and again; what they got: score and verdict, or an error's text."""
    found: list[tuple[float, str]] = []
    done = threading.Event()

    def ask() -> None:
        with TritonInspector(url, category) as inspector:
            while not done.is_set():
                try:
                    got = inspector.inspect(make_frame())
                    found.append((got.score, got.verdict))
                except Exception as error:  # noqa: PERF203  whatever it is, the test must see it
                    found.append((np.nan, f"{type(error).__name__}: {error}"))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.slow
def test_a_category_is_replaced_under_load_and_no_request_fails(
    bundles: list[Path], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    left, right = write_categories(bundles[:2], tmp_path / "line", "onnxruntime")
    want = Inspector(tiny_bundle, "fused").inspect(make_frame())
    alone, served = [], [left.path, right.path]
    with (
        LocalServer(served) as server,
        closing(Control(Path(server.folder.name), partial(cli._answer, server, None))),
        asked_all_the_time(server.grpc_url, "left", 2) as of_left,
        asked_all_the_time(server.grpc_url, "right", 2) as of_right,
    ):
        # Another threshold: only the steps around the stages change.
        threshold = Bundle.open(bundles[0]).document["threshold"]
        Bundle.open(bundles[0]).update(threshold={**threshold, "value": want.score + 1})
        write_repository(bundles[0], left.path, "onnxruntime")
        command = [str(Path(sys.executable).parent / "m3ad-triton"), "reload", str(left.path), "--json"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert json.loads(told.stdout) == {"category": "left"}
        with TritonInspector(server.grpc_url, "left") as inspector:
            assert inspector.inspect_frame(make_frame()).verdict == "good"
            assert inspector.limits.reject == want.score + 1
        # Another network: the same head as the other category's from now on.
        write_repository(renamed(Bundle.open(bundles[1]), "left", tmp_path), left.path, "onnxruntime")
        server.reload(left.path)
        assert server.models.categories["left"].names["left_head"] == "right_head"
        # One whose answer is not its golden one is not taken up.
        wrong = renamed(Bundle.open(bundles[1]), "left", tmp_path / "wrong")
        np.save(wrong / "golden" / "score.npy", np.load(wrong / "golden" / "score.npy") + 1)
        rehash_bundle(wrong)
        write_repository(wrong, left.path, "onnxruntime")
        with pytest.raises(
            ServerError, match=r"`score` differs from the bundle's by 1, .*left is served as bef"
        ):
            ask_server(left.path, 120)
        models = {path.name for path in server.models.folder.iterdir()}
        assert models == server.models.names()
        alone.append(server_memory(server.pid))
    for found in (of_left, of_right):
        assert len(found) > 5
        assert {score for score, _ in found} == {want.score}, {said for _, said in found}
    assert {said for _, said in of_right} == {want.verdict}
    assert {said for _, said in of_left} == {want.verdict, "good"}
    assert alone[0] > 50 * 2**20
    assert not os.path.exists(server.folder.name)
