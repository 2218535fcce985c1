"""A repository is looked at before anything of it is used: manifest, listed files, and what is not listed."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.errors import ArtifactError
from m3ad.typed_json import read_json
from m3ad_triton.docker import docker_line
from m3ad_triton.elf import library_problem
from m3ad_triton.manifest import RepositoryManifest
from m3ad_triton.repository import Repository
from m3ad_triton.server import LocalServer
from m3ad_triton.verify import find_problems
from serving import rehash


@pytest.fixture
def repository(fused_repository: Path, tmp_path: Path) -> Path:
    path = tmp_path / "repository"
    shutil.copytree(fused_repository, path)
    return path


def change(repository: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = repository / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def first(document: dict[str, Any]) -> str:
    return min(document["files"])


def entry(document: dict[str, Any]) -> dict[str, Any]:
    return dict(document["files"][first(document)])


ZERO = {"sha256": "0" * 64, "bytes": 1}
WRONG = {
    "no layout": (lambda m: m.pop("layout"), "missing required field `layout`"),
    "layout": (lambda m: m.update(layout="tree"), r"Invalid enum value 'tree' - at `\$\.layout`"),
    "layout's type": (lambda m: m.update(layout=["fused"]), r"got `array` - at `\$\.layout`"),
    "runtime": (lambda m: m.update(runtime="x"), r"Invalid enum value 'x' - at `\$\.runtime`"),
    "category": (lambda m: m.update(category="../x"), r"matching regex .* - at `\$\.category`"),
    "category's end": (lambda m: m.update(category="other\n"), r"matching regex .* - at `\$\.category`"),
    "version": (lambda m: m.update(contract_version=[]), r"contract version \[\], this m3ad serves"),
    "version is true": (lambda m: m.update(contract_version=True), "contract version True, this m3ad"),
    "dims is text": (lambda m: m.update(dims="x"), r"Expected `object`, got `str` - at `\$\.dims`"),
    "size": (
        lambda m: m["dims"].update(groups=-1),
        r"groups must lie in 1\.\.1048576, got -1 - at `\$\.dims`",
    ),
    "size is huge": (lambda m: m["dims"].update(rgb_width=10**9), r"rgb_width must lie in 1\.\.1048576"),
    "size is true": (lambda m: m["dims"].update(groups=True), r"got `bool` - at `\$\.dims\.groups`"),
    "size of no square": (lambda m: m["dims"].update(rgb_tokens=5), "rgb_tokens must be a square"),
    "unknown size": (lambda m: m["dims"].update(depth=1), r"missing or unknown: 'depth' - at `\$\.dims`"),
    "no size": (lambda m: m["dims"].pop("groups"), r"missing or unknown: 'groups' - at `\$\.dims`"),
    "unknown entry": (lambda m: m.update({"x\x1b[2J": 1}), r"unknown field `x\?\[2J`"),
    "NaN": (
        lambda m: m["dims"].update(min_norm_sq=float("nan")),
        r"nan is not a finite number - at `\$\.dims\.min_norm_sq`",
    ),
    "huge": (lambda m: m["dims"].update(min_norm_sq=10**400), r"out of range - at `\$\.dims\.min_norm_sq`"),
    "pool": (lambda m: m.update(cuda_pool_bytes="1"), r"got `str` - at `\$\.cuda_pool_bytes`"),
    "pool below nothing": (lambda m: m.update(cuda_pool_bytes=-1), r">= 0 - at `\$\.cuda_pool_bytes`"),
    "shims": (lambda m: m["plugins"].update(shims="x"), r"got `str` - at `\$\.plugins\.shims`"),
    "no plugins": (lambda m: m.update(plugins=None), r"got `null` - at `\$\.plugins`"),
    "library outside": (
        lambda m: m["plugins"].update(library="../e.so"),
        r"matching regex .* - at `\$\.plugins\.library`",
    ),
    "library at root": (
        lambda m: m["plugins"].update(library="/e.so"),
        r"matching regex .* - at `\$\.plugins\.library`",
    ),
    "library not listed": (
        lambda m: m["plugins"].update(library="e.so"),
        "names e.so, which `files` does not",
    ),
    "shim not listed": (lambda m: m["plugins"].update(shims=["e.so"]), "names e.so, which `files` does not"),
    "shim's name": (
        lambda m: m["plugins"].update(shims=["a;b"]),
        r"matching regex .* - at `\$\.plugins\.shims\[0\]`",
    ),
    "plans of nobody": (lambda m: m.update(runtime="tensorrt"), "`engines` is empty, expected those"),
    "engine": (lambda m: m.update(engines=[1]), r"got `int` - at `\$\.engines\[0\]`"),
    "engine of nothing": (lambda m: m.update(engines=[{}]), "missing required field `target`"),
    "no files": (lambda m: m.pop("files"), "missing required field `files`"),
    "empty files": (lambda m: m.update(files={}), "`files` is empty, expected every file"),
    "files is a list": (lambda m: m.update(files=[]), r"got `array` - at `\$\.files`"),
    "entry is a list": (
        lambda m: m["files"].update({first(m): []}),
        r"got `array` - at `\$\.files\[\.\.\.\]`",
    ),
    "entry is true": (
        lambda m: m["files"].update({first(m): True}),
        r"got `bool` - at `\$\.files\[\.\.\.\]`",
    ),
    "sha256": (lambda m: m["files"][first(m)].update(sha256=-1), r"got `int` - at `.*\.sha256`"),
    "sha256's end": (
        lambda m: m["files"][first(m)].update(sha256="0" * 64 + "\n"),
        r"matching regex .* - at `.*\.sha256`",
    ),
    "bytes": (lambda m: m["files"][first(m)].update(bytes=1.0), r"got `float` - at `.*\.bytes`"),
    "step up": (lambda m: m["files"].update({"../x": ZERO}), r"`files` lists '\.\./x', expected paths"),
    "root": (lambda m: m["files"].update({"/etc/passwd": ZERO}), "`files` lists '/etc/passwd', expected"),
    "back": (lambda m: m["files"].update({"a\\b": ZERO}), r"`files` lists 'a\\\\b', expected paths"),
    "same place": (lambda m: m["files"].update({"./a": ZERO}), "`files` lists './a', expected paths"),
    "no name": (lambda m: m["files"].update({"": ZERO}), "`files` lists '', expected paths"),
    "half a letter": (lambda m: m["files"].update({"\ud800": ZERO}), "half of a surrogate pair"),
    "itself": (
        lambda m: m["files"].update({"manifest.json": ZERO}),
        "`files` lists 'manifest.json', expected",
    ),
    "bundle": (lambda m: m.update(bundle_sha256="x"), r"matching regex .* - at `\$\.bundle_sha256`"),
    "weights": (lambda m: m.update(weights="\x1b[2J"), r"matching regex .* - at `\$\.weights`"),
}


@pytest.mark.parametrize("what", WRONG)
def test_each_wrong_entry_is_one_sentence_that_names_it(what: str, repository: Path) -> None:
    edit, message = WRONG[what]
    assert find_problems(repository) == []
    change(repository, edit)
    for look in (find_problems, Repository.open):
        with pytest.raises(ArtifactError, match=message) as refused:
            look(repository)
        assert "m3ad-triton write BUNDLE REPO" in str(refused.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, '{"n":' + "9" * 5000 + "}", "", "null", "\0"]
)
def test_a_manifest_that_is_no_document_is_one_sentence(text: str, repository: Path) -> None:
    (repository / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Repository.open(repository)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data(), value=JSON)
@settings(max_examples=200, deadline=None)
def test_any_wrong_value_anywhere_is_a_sentence_or_taken_as_it_is(
    fused_repository: Path, data: st.DataObject, value: Any
) -> None:
    document = copy.deepcopy(json.loads((fused_repository / "manifest.json").read_text()))
    place, key = document, data.draw(st.sampled_from(sorted(document)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = value
    path = fused_repository.parent / "any.json"
    path.write_text(json.dumps(document))
    read = None
    with contextlib.suppress(ArtifactError):
        read = RepositoryManifest.from_json(read_json(path, "a"), "s", "a")
    if read is not None:
        del document["format"]
        assert json.loads(json.dumps(read.to_json())).items() >= json.loads(json.dumps(document)).items()


def refusals(repository: Path) -> str:
    """What is told of it; whoever opens it must refuse it."""
    told = "\n".join(find_problems(repository))
    for use in (
        Repository.open,
        lambda path: LocalServer([path]),
        lambda path: docker_line([Repository.open(path)]),
    ):
        with pytest.raises(ArtifactError, match=r"is not listed|is a link|is missing|was changed"):
            use(repository)
    return told


@pytest.mark.parametrize(
    "name",
    [
        "other_head/1/__pycache__/model.cpython-311.pyc",
        "other_head/__pycache__/deep/er/x.pyc",
        "__pycache__/x.pyc",
        "other_head/1/onnxruntime.py",
        "other_head/2/model.py",
        ".hidden",
        "other_head/1/.hidden",
    ],
)
def test_a_file_that_is_not_listed_is_refused_at_any_depth(name: str, repository: Path) -> None:
    path = repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    told = refusals(repository)
    assert f"{path} is not listed in manifest.json, a server must not find it. " in told
    if "__pycache__" in name:
        cache = name[: name.index("__pycache__") + len("__pycache__")]
        assert f"left byte code: remove the folder {cache}" in told


def test_an_empty_version_folder_is_refused(repository: Path) -> None:
    (repository / "other_head" / "2").mkdir()
    told = refusals(repository)
    assert "other_head/2 is not listed" in told
    assert "`other_head` has the version folders 1, 2, Triton would serve the last; expected 1 alone" in told


@pytest.mark.parametrize("whole_folder", [False, True])
def test_links_are_refused_listed_or_not(whole_folder: bool, repository: Path, tmp_path: Path) -> None:
    inside = repository / "other_head" / ("1" if whole_folder else "1/model.py")
    outside = tmp_path / "outside"
    os.rename(inside, outside)
    inside.symlink_to(outside)
    assert f"{inside} is a link, a repository holds its files itself" in refusals(repository)
    inside.unlink()
    os.rename(outside, inside)
    assert find_problems(repository) == []
    (repository / "loop").symlink_to(repository)
    assert f"{repository / 'loop'} is not listed" in refusals(repository)


def test_code_that_m3ad_did_not_write_is_told_though_its_hash_is_right(repository: Path) -> None:
    (repository / "other_head" / "1" / "model.py").write_text("print('other code')")
    rehash(repository)
    (problem,) = find_problems(repository)
    assert "other_head/1/model.py is not the code that m3ad writes there" in problem


@pytest.mark.parametrize(
    ("model", "text", "field"),
    [
        ("other_head", 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/x" } }', "parameters"),
        ("other_head", 'runtime: "libelse.so"', "runtime"),
        ("other_head", "instance_group { count: 2 kind: KIND_CPU }", "instance_group"),
        ("other", "response_cache { enable: true }", "response_cache"),
    ],
)
def test_a_configuration_field_that_m3ad_does_not_write_is_told(
    model: str, text: str, field: str, repository: Path
) -> None:
    path = repository / model / "config.pbtxt"
    path.write_text(path.read_text() + text + "\n")
    rehash(repository)
    (problem,) = find_problems(repository)
    assert f"model `{model}` differs from what m3ad writes in `{field}`" in problem


@pytest.mark.parametrize("threshold", ["NaN", "Infinity", "null", '\\"1\\"'])
def test_a_threshold_that_gives_no_verdict_is_told(threshold: str, repository: Path) -> None:
    path = repository / "other" / "config.pbtxt"
    assert '\\"threshold\\": 0.01' in path.read_text()
    path.write_text(path.read_text().replace('\\"threshold\\": 0.01', f'\\"threshold\\": {threshold}'))
    rehash(repository)
    (problem,) = find_problems(repository)
    assert "parameter `m3ad` of model `other`" in problem
    assert "`$.threshold`" in problem


@pytest.fixture
def compile_library(tmp_path: Path) -> Callable[..., Path]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("a C compiler makes the libraries of this test and is not installed")

    def build(name: str, source: str, *arguments: str) -> Path:
        (tmp_path / f"{name}.c").write_text(source)
        command = [compiler, "-shared", "-fPIC", "-o", f"{name}.so", f"{name}.c", *arguments]
        subprocess.run(command, check=True, cwd=tmp_path)
        return tmp_path / f"{name}.so"

    return build


def test_check_runs_no_code_of_a_library_listed_or_not(
    repository: Path, tmp_path: Path, compile_library: Callable[..., Path]
) -> None:
    source = f'#include <stdio.h>\n__attribute__((constructor)) void f() {{ fclose(fopen("{tmp_path}/ran", "w")); }}'
    library = compile_library("libevil", source)
    subprocess.run(["python3", "-c", f"import ctypes; ctypes.CDLL('{library}')"], check=True)
    (tmp_path / "ran").unlink()  # it works
    engine = {"target": "native", "runtime": "tensorrt", "compute_capability": "8.9"}
    shutil.copy(library, repository)
    rehash(repository)
    change(repository, lambda m: m.update(runtime="tensorrt", engines=[engine]))
    change(repository, lambda m: m["plugins"].update(library=library.name, missing=None))
    assert not any("plugin library" in problem for problem in find_problems(repository))
    change(repository, lambda m: m["plugins"].update(library=f"../{library.name}"))
    with pytest.raises(ArtifactError, match=r"at `\$\.plugins\.library`"):
        find_problems(repository)
    assert not (tmp_path / "ran").exists()


def test_what_a_library_needs_is_read_from_it(tmp_path: Path, compile_library: Callable[..., Path]) -> None:
    compile_library("libm3ad_absent", "int f(void) { return 1; }", "-Wl,-soname,libm3ad_absent.so.3")
    alone = compile_library("libalone", "int g(void) { return 1; }")
    needs = compile_library(
        "libneeds", "int f(void); int g(void) { return f(); }", "-L.", "-l:libm3ad_absent.so"
    )
    assert library_problem(alone) is None
    assert library_problem(needs) == "it needs libm3ad_absent.so.3, which is not on this machine"
    data = bytearray(alone.read_bytes())
    data[18:20] = (2).to_bytes(2, "little")  # SPARC
    alone.write_bytes(data)
    assert "it was built for machine 2, this is " in str(library_problem(alone))
    program = tmp_path / "cut.so"
    program.write_bytes(needs.read_bytes()[:100])
    assert library_problem(program) == "its headers are damaged"


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=100, deadline=None)
def test_no_bytes_break_the_reader_of_libraries(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bool
) -> None:
    path = tmp_path_factory.mktemp("library") / "x.so"
    path.write_bytes((b"\x7fELF\x02\x01" + b"\0" * 10 + b"\x03\0\x3e\0" if head else b"") + data)
    problem = library_problem(path)
    assert problem is None or isinstance(problem, str)
