"""A configuration's values, and its mistakes, each with its line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from m3ad.errors import ArtifactError, MissingDependencyError
from m3ad_client.station import config, needs, sink_tables

GOOD = """[station]
folder = "kept"

[[camera]]
name = "left"
folder = "in"
url = "localhost:8001"

[[sink]]
kind = "jsonl"
name = "lines"
path = "/var/verdicts.jsonl"
"""


def read(folder: Path, text: str) -> config.Config:
    (folder / "s.toml").write_text(text)
    return config.read_config(folder / "s.toml")


def test_paths_are_from_the_files_folder(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.store.folder == tmp_path / "kept"
    assert found.cameras[0].folder == tmp_path / "in"
    assert found.cameras[0].settle_s == 0.5
    assert found.sinks == [sink_tables.JsonLines(name="lines", path=Path("/var/verdicts.jsonl"))]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            'folder = "in"\n',
            'folder = "in"\nsettle_s = "long"\n',
            "line 7: Expected `float`, got `str` in `settle_s`",
        ),
        (
            'folder = "in"\n',
            'folder = "in"\nsetle_s = 1\n',
            "line 7: Object contains unknown field `setle_s`",
        ),
        ('folder = "in"\n', "", "line 4: Object missing required field `folder`"),
        ('folder = "in"\n', "folder = 3\n", "line 6: expected a path, got 3"),
        ('url = "localhost:8001"', "", "line 4: expected `bundle`, a folder, or `url`"),
        ('url = "localhost:8001"', 'url = "a:1"\nthreads = 2', "line 8: `threads` goes with a bundle alone"),
        (
            'url = "localhost:8001"',
            'url = "a:1"\nruntime = "auto"',
            "line 8: `runtime` goes with a bundle alone",
        ),
        ('url = "localhost:8001"', 'bundle = "b"\ntls = true', "line 8: `tls` goes with a url alone"),
        ('url = "localhost:8001"', 'url = "a:1"\nca = "c"', "line 8: `ca` goes with `tls = true`"),
        (
            'url = "localhost:8001"',
            'url = "a:1"\ntls = true\ncert = "c"',
            "line 9: `cert` and `key` go together",
        ),
        (
            'url = "localhost:8001"',
            'bundle = "b"\nruntime = "cuda"',
            "line 8: Invalid enum value 'cuda' in `runtime`",
        ),
        (
            'url = "localhost:8001"',
            'url = "a:1"\nthreshold = 1\nreview = 2',
            "the limit of review, 2, lies above",
        ),
        ('name = "left"', 'name = "a/b"', "line 5: Expected `str` matching regex"),
        ('kind = "jsonl"', 'kind = "fax"', "line 10: Invalid value 'fax'"),
        ("[[sink]]", "[[sinks]]", "line 9: `sinks` is unknown"),
        ("[station]\n", "[station]\nkeep_days = 0\n", "line 2: Expected `float` > 0.0"),
        ("[[camera]]", "[camera]", "line 4: write [[camera]], in double brackets"),
        ("[station]", "[station", "is not valid TOML"),
    ],
)
def test_a_mistake_is_told_with_its_line(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(ArtifactError, match=r"s\.toml") as error:
        read(tmp_path, GOOD.replace(old, new))
    assert told in str(error.value)


def test_every_tables_mistake_is_told_at_once(tmp_path: Path) -> None:
    twice = GOOD + '\n[[camera]]\nname = "left"\nfolder = "in"\nurl = "b:1"\n'
    with pytest.raises(ArtifactError) as error:
        read(tmp_path, twice.replace('folder = "kept"', "keep_gib = 1"))
    assert (
        "line 1: Object missing required field `folder`; line 15: another camera has the name 'left'"
        in str(error.value)
    )
    assert "line 16: another camera has the folder" in str(error.value)
    with pytest.raises(ArtifactError, match="line 1: there is no \\[station\\]"):
        read(tmp_path, "")
    with pytest.raises(ArtifactError, match="cannot be read"):
        config.read_config(tmp_path / "absent.toml")


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(
        MissingDependencyError,
        match=r"needs the package absent_one; install it with: pip install 'm3ad\[station\]'",
    ):
        needs.needed("absent_one")


def test_the_fixtures_configuration_is_sound(settings: Callable[..., Path]) -> None:
    assert [type(sink).__name__ for sink in config.read_config(settings()).sinks] == ["JsonLines", "Csv"]
