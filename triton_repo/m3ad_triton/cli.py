"""Command `m3ad-triton`: write, check and serve model repositories."""

import contextlib
import signal
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from m3ad import cli as shared
from m3ad.camera import read_camera
from m3ad.contract import Layout
from m3ad.errors import ArtifactError, ServerError
from m3ad.frame_door import DepthType
from m3ad.signature import verify_signature
from m3ad.systemd import tell_systemd
from tritonclient.utils import InferenceServerException

from m3ad_triton.binary import find_binary
from m3ad_triton.categories import find_repositories, write_categories
from m3ad_triton.config import QUEUE, Queue
from m3ad_triton.docker import IMAGE, docker_line, write_context
from m3ad_triton.endpoints import LOOPBACK, Ports, Tls, exposure
from m3ad_triton.frame_checks import frame_checks
from m3ad_triton.golden import Golden
from m3ad_triton.heal import Watch
from m3ad_triton.health import Health
from m3ad_triton.line import Line
from m3ad_triton.manifest import RepositoryManifest, Runtime
from m3ad_triton.memory import compare
from m3ad_triton.reload import Control, ask_server
from m3ad_triton.repository import Repository, write_repository
from m3ad_triton.server import LocalServer
from m3ad_triton.verify import doors, find_problems, verify_repository

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Repositories = Annotated[list[Path], typer.Argument(metavar="REPO...", help="what `m3ad-triton write` wrote")]
RequireSignature = Annotated[
    Path | None,
    typer.Option(
        metavar="PUBKEY", help="take only what `m3ad-export sign` signed with this key (Ed25519, PEM)"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]


@app.command()
def write(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="what `m3ad-export bundle` wrote")
    ],
    repo: Annotated[
        Path,
        typer.Argument(
            help="the folder to write; an older repository there is replaced. Of several bundles, REPO/CATEGORY is"
        ),
    ],
    runtime: Annotated[
        Runtime, typer.Option(help="onnxruntime: Python backend on the CPU; tensorrt: plans on a GPU")
    ] = "onnxruntime",
    layout: Annotated[
        Layout | None,
        typer.Option(help="chain: one model a stage; fused: extractors and one head, the one to ship"),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="engines to take, as in sm89; several may be given, all if none")
    ] = None,
    frames: Annotated[
        bool,
        typer.Option(
            "--frames/--no-frames", help="whether to write the door that takes frames; it needs Python"
        ),
    ] = True,
    depth: Annotated[
        DepthType | None, typer.Option(help="let CATEGORY take depth images of this type instead of clouds")
    ] = None,
    camera: Annotated[
        Path | None, typer.Option(help="with --depth: its intrinsics (JSON); the bundle's if left out")
    ] = None,
    queue_timeout_s: Annotated[
        float,
        typer.Option(help="how long a frame may wait before it is refused; 0: for ever", min=0, max=1e6),
    ] = QUEUE.timeout_s,
    queue_frames: Annotated[
        int,
        typer.Option(
            help="how many frames may wait at a door; a further one is refused at once; 0: any number",
            min=0,
            max=10**6,
        ),
    ] = QUEUE.frames,
    require_signature: RequireSignature = None,
    as_json: Json = False,
) -> None:
    """Write the Triton model repository of a bundle, or of several, one for each.

    The ensemble CATEGORY takes frames and gives verdicts, CATEGORY_tensors takes what m3ad made of a frame; their
    steps are CATEGORY_STAGE, so several categories can be served together. Stages with equal files, such as frozen
    extractors, are then loaded once.
    """
    if (camera and not depth) or (depth and not frames):
        raise typer.BadParameter("--camera needs --depth, and --depth needs the door that takes frames")
    if require_signature:
        for bundle in bundles:
            verify_signature(bundle, require_signature)
    door: dict[str, Any] = {
        "frames": frames,
        "depth": depth,
        "camera": read_camera(camera) if camera else None,
        "queue": Queue(timeout_s=queue_timeout_s, frames=queue_frames),
    }
    if len(bundles) == 1:
        written = [write_repository(bundles[0], repo, runtime, layout, target or (), **door)]
    else:
        written = write_categories(bundles, repo, runtime, layout, target or (), **door)
    for repository in written:
        for problem in find_problems(repository.path, with_files=False):
            shared.talk.print(f"note: {problem}")
    if as_json:
        summaries = [_summary(repository) for repository in written]
        shared.print_json(summaries[0] if len(bundles) == 1 else {"repositories": summaries})
        return
    for repository in written:
        manifest = repository.manifest
        shared.print_text(
            f"{repository.path}: ensemble {', '.join(reversed(doors(manifest)))}, {manifest.layout} layout, {runtime}"
        )
    shared.talk.print(f"serve it: m3ad-triton serve {repo}")


@app.command()
def check(repo: Annotated[Path, typer.Argument(help="the folder to check")], as_json: Json = False) -> None:
    """Check a repository without a server: wiring, contract, files, plugin library."""
    problems = [problem for path in find_repositories([repo]) for problem in find_problems(path)]
    if as_json:
        shared.print_json({"repository": str(repo), "ok": not problems, "problems": problems})
    else:
        for problem in problems:
            shared.print_text(problem)
    if problems:
        raise ArtifactError(f"{repo} has {len(problems)} problem{'s' if len(problems) > 1 else ''}")
    shared.talk.print(f"{repo} can be served")


@app.command()
def serve(
    repos: Repositories,
    host: Annotated[
        str, typer.Option(help="address to listen on; 0.0.0.0 lets other machines in")
    ] = LOOPBACK,
    metrics_host: Annotated[
        str | None,
        typer.Option(
            help="address of the metrics, always plain HTTP; --host if left out, with --cert 127.0.0.1"
        ),
    ] = None,
    http_port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8002,
    cert: Annotated[
        Path | None,
        typer.Option(
            help="server certificate: gRPC over TLS, HTTP answers health on this machine only", exists=True
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="its key", exists=True)] = None,
    ca: Annotated[
        Path | None, typer.Option(help="ask clients for a certificate of this CA", exists=True)
    ] = None,
    http_plain: Annotated[
        bool,
        typer.Option("--http-plain", help="with --cert: answer everything over plain HTTP, too, to anybody"),
    ] = False,
    tritonserver: Annotated[
        Path | None, typer.Option(help="the binary; found by itself if not given")
    ] = None,
    ready_timeout_s: Annotated[float, typer.Option(help="time for all models to load and warm up")] = 300.0,
    probe_period_s: Annotated[
        float | None,
        typer.Option(
            help="between two golden frames of a category; 50 times what asking takes, at least 2 s", min=0.1
        ),
    ] = None,
    probe_timeout_s: Annotated[
        float | None, typer.Option(help="for a golden frame; 20 times what one takes, at least 5 s", min=0.1)
    ] = None,
    health_port: Annotated[
        int | None,
        typer.Option(
            help="answer GET /health here, on the metrics' address; 0 takes a free one", min=0, max=65535
        ),
    ] = None,
    require_signature: RequireSignature = None,
    as_json: Json = False,
) -> None:
    """Serve repositories in the foreground with a Triton on this machine; Ctrl-C stops it.

    Once ready, its URLs and the `docker run` line for the official image are printed. Triton has TLS for gRPC alone:
    with --cert, HTTP answers nothing but health, and only on 127.0.0.1, unless --http-plain. Every category is asked
    for frames whose answers are known; when a process dies, is stopped, hangs or an answer is not the bundle's, the
    server is started again.
    """
    if (cert is None) != (key is None) or ((ca or http_plain) and not cert):
        raise typer.BadParameter("--cert and --key go together, and --ca and --http-plain need them")
    repos = find_repositories(repos)
    for repo in repos:
        if require_signature:
            verify_signature(repo, require_signature)
        verify_repository(repo, with_files=False)  # the server hashes them when it opens the repository
    server = LocalServer(
        repos,
        ports=Ports(http=http_port, grpc=grpc_port, metrics=metrics_port),
        host=host,
        metrics_host=metrics_host,
        ready_timeout_s=ready_timeout_s,
        tls=Tls(cert=cert, key=key, ca=ca, http_plain=http_plain) if cert and key else None,
        binary=find_binary(tritonserver),
    )
    signal.signal(signal.SIGTERM, _interrupt)
    for line in exposure(server.hosts, server.tls):
        shared.talk.print(line)
    shared.talk.print("starting Triton, loading and warming up the models ...")
    started = time.perf_counter()
    watch = Watch(server, shared.say, probe_period_s, probe_timeout_s)
    with server:
        watch.begin()
        seconds = time.perf_counter() - started
        found = {"pid": server.pid, "grpc_url": server.grpc_url, "http_url": server.http_url}
        found["ready_s"] = round(seconds, 1)
        found["models"] = [r.manifest.category for r in server.repositories]
        with contextlib.ExitStack() as while_served:
            control = Control(Path(server.folder.name), partial(_answer, server, require_signature))
            while_served.callback(control.close)
            if health_port is not None:
                health = Health(server.hosts.metrics, health_port, lambda: watch.problem)
                while_served.callback(health.close)
                found["health_url"] = f"http://{server.hosts.metrics}:{health.port}/health"
            if as_json:
                shared.print_json(found)
            else:
                shared.print_text(
                    f"ready in {seconds:.1f} s: gRPC {server.grpc_url}, HTTP {server.http_url}, pid {server.pid}"
                )
                shared.talk.print(f"inspect: m3ad-client infer RGB XYZ --url {server.grpc_url}")
                shared.talk.print(f"official image: {docker_line(server.repositories)}")
            tell_systemd("READY=1")
            watch.run()


@app.command()
def probe(
    repos: Repositories,
    url: Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC endpoint")] = "localhost:8001",
    timeout_s: Annotated[float, typer.Option(help="how long an answer may take")] = 30.0,
    ca: Annotated[Path | None, typer.Option(help="for TLS: authority to trust", exists=True)] = None,
    cert: Annotated[Path | None, typer.Option(help="client certificate", exists=True)] = None,
    key: Annotated[Path | None, typer.Option(help="client key", exists=True)] = None,
    as_json: Json = False,
) -> None:
    """Ask a server for the golden frame of each category; exit code 1 unless it answers as the bundles do.

    `gate`, `prepare` and `judge`, which that does not go through, are asked for one of their own.

    What `serve` does by itself, for health checks of containers and of servers that it did not start.
    """
    if (cert is None) != (key is None) or (cert and not ca):
        raise typer.BadParameter("--cert and --key go together and need --ca")
    tls = {"root_certificates": ca, "private_key": key, "certificate_chain": cert} if ca else {}
    found = {}
    with Line(url, ssl=bool(ca), **{name: str(path) for name, path in tls.items() if path}) as line:
        for repo in find_repositories(repos):
            manifest = RepositoryManifest.read(repo)
            golden = Golden.read(repo, manifest)
            started = time.perf_counter()
            try:
                problem = line.difference(golden, timeout_s)
                if checks := frame_checks(Repository(repo, manifest), golden):
                    gate, prepare, *_, judge = line.steps(manifest.category)
                    for check, model in zip(checks, (gate, prepare, judge), strict=True):
                        problem = problem or line.frame_difference(check, timeout_s, model)
            except InferenceServerException as error:
                raise ServerError(
                    f"{golden.door} at {url} gives no answer ({error.message()}); look at the server's log, or start "
                    f"it: m3ad-triton serve {repo}"
                ) from error
            if problem:
                raise ServerError(
                    f"{golden.door} at {url} does not answer its golden frame as the bundle does: {problem}"
                )
            found[golden.door] = round((time.perf_counter() - started) * 1000, 1)
            if not as_json:
                shared.print_text(f"{golden.door}: as the bundle, {found[golden.door]:.0f} ms")
    if as_json:
        shared.print_json({"ok": True, "ms": found})


@app.command()
def reload(
    repo: Annotated[Path, typer.Argument(help="a repository that a server of this machine and user serves")],
    timeout_s: Annotated[float, typer.Option(help="how long the server may take")] = 600.0,
    as_json: Json = False,
) -> None:
    """Let the running server take up a category's repository as it lies now: a new threshold, a new bundle.

    The other categories are served on, and the old stages answer until the new ones have answered the new golden
    frame as their bundle does. No request fails for it.
    """
    for path in find_repositories([repo]):
        told = ask_server(path, timeout_s)
        if as_json:
            shared.print_json(told)
        else:
            shared.print_text(f"{path}: {told['category']} is served as it lies there now")


@app.command()
def memory(
    repos: Repositories,
    tritonserver: Annotated[
        Path | None, typer.Option(help="the binary; found by itself if not given")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a server of all categories against a server of the first alone and one server each (PSS, idle)."""
    found = compare(find_repositories(repos), find_binary(tritonserver))
    if as_json:
        shared.print_json(found)
        return
    together, first, each = (found[name] / 2**20 for name in ("together", "first", "one_each"))
    shared.print_text(f"one server of {found['categories']} categories  {together:7.0f} MiB")
    shared.print_text(
        f"one server of the first       {first:7.0f} MiB, {together / first:.2f} times as much together"
    )
    shared.print_text(
        f"{found['categories']} servers                     {each:7.0f} MiB, {each / together:.2f} times as much"
    )


@app.command()
def docker(
    repos: Repositories,
    image: Annotated[str, typer.Option(help="the official image to use")] = IMAGE,
    write_to: Annotated[
        Path | None,
        typer.Option("--write", metavar="FOLDER", help="write a Dockerfile and all it needs instead"),
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="with --write: m3ad's wheel, which stages on the CPU need")
    ] = None,
    jetson: Annotated[
        bool, typer.Option("--jetson", help="with --write: for a Jetson's integrated GPU")
    ] = False,
) -> None:
    """Print the `docker run` line that serves repositories with the official image.

    With --write, a folder for `docker build` is made, repositories inside, and the line that builds and runs it is
    printed. Building fetches the official image and Python packages; the image that comes of it needs no network.
    """
    if write_to is None and (wheel or jetson):
        raise typer.BadParameter("--wheel and --jetson go with --write")
    opened = [Repository.open(repo) for repo in find_repositories(repos)]
    if write_to is None:
        shared.print_text(docker_line(opened, image))
    else:
        shared.print_text(write_context(opened, write_to, wheel, jetson=jetson))


def _summary(repository: Repository) -> dict[str, Any]:
    return {
        "repository": str(repository.path),
        **{k: v for k, v in repository.manifest.to_json().items() if k != "files"},
    }


def _answer(server: LocalServer, signed_by: Path | None, request: dict[str, Any]) -> dict[str, Any]:
    """What the server says to `m3ad-triton reload`."""
    paths = {str(repository.path): repository for repository in server.repositories}
    if request.get("do") == "reload" and request.get("repository") in paths:
        path = str(request["repository"])
        if signed_by:
            verify_signature(Path(path), signed_by)
        server.reload(Path(path))
        return {"category": paths[path].manifest.category}
    return {"repositories": list(paths)}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command."""
    shared.run(app)
