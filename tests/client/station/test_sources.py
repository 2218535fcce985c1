"""Which frames of a folder are whole, and how files are taken from it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from m3ad_client.station import config, sources
from serving import make_frame, write_frame


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def inbox(folder: Path, **more: Any) -> tuple[sources.Inbox, Clock]:
    clock = Clock()
    camera = config.Camera(name="left", folder=folder, settle_s=1.0, url="a:1", **more)
    return sources.Inbox(camera, clock), clock


def names(box: sources.Inbox) -> list[str]:
    return [found.name for found in box.settled()]


def test_a_file_that_still_grows_is_not_taken(tmp_path: Path) -> None:
    box, clock = inbox(tmp_path)
    rgb, _ = write_frame(tmp_path, "a", make_frame(1))
    assert names(box) == []
    assert box.waiting == 1
    clock.now = 0.9
    with rgb.open("ab") as file:
        file.write(b"more")
    assert names(box) == []
    clock.now = 1.8
    assert names(box) == []
    clock.now = 1.91
    assert names(box) == ["a"]
    assert box.waiting == 0


def test_a_clock_that_jumps_does_not_matter_and_an_empty_file_waits(tmp_path: Path) -> None:
    box, clock = inbox(tmp_path)
    rgb, _ = write_frame(tmp_path, "a", make_frame(1))
    os.utime(rgb, (4e9, 4e9))  # from the future
    names(box)
    clock.now = 1.0
    assert names(box) == ["a"]
    rgb.write_bytes(b"")
    names(box)
    clock.now = 9.0
    assert names(box) == []


def test_frames_come_in_the_order_of_their_files(tmp_path: Path) -> None:
    box, clock = inbox(tmp_path)
    for age, name in enumerate(("b", "c", "a")):
        for path in write_frame(tmp_path, name, make_frame(1)):
            os.utime(path, (1000 + age, 1000 + age))
    names(box)
    clock.now = 1.0
    assert names(box) == ["b", "c", "a"]


def test_a_marker_says_that_a_frame_is_whole(tmp_path: Path) -> None:
    box, clock = inbox(tmp_path, done_marker=True)
    rgb, _ = write_frame(tmp_path, "a", make_frame(1))
    write_frame(tmp_path, "b", make_frame(2))
    clock.now = 99.0
    assert names(box) == []
    (tmp_path / "rgb" / "a.done").touch()
    assert names(box) == ["a"]
    (tmp_path / "b.done").touch()
    assert sorted(names(box)) == ["a", "b"]
    box.unmark(rgb)
    assert names(box) == ["b"]


def test_side_by_side_and_depth_layouts(tmp_path: Path) -> None:
    for name in ("a.png", "a.tiff", "b.tiff", "b.npy", "c.tiff", "c.ply", "._a.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    box, clock = inbox(tmp_path)
    names(box)
    clock.now = 1.0
    pairs = {found.name: (found.rgb.suffix, found.xyz.suffix) for found in box.settled()}
    assert pairs == {"a": (".png", ".tiff"), "b": (".tiff", ".npy"), "c": (".tiff", ".ply")}
    depth = tmp_path / "d"
    for name in ("rgb/a.png", "depth/a.png"):
        (depth / name).parent.mkdir(parents=True)
        (depth / name).write_bytes(b"x")
    box, clock = inbox(depth)
    names(box)
    clock.now = 1.0
    assert [found.xyz for found in box.settled()] == [depth / "depth" / "a.png"]


def test_what_is_no_pair_is_told_of_and_holds_nothing_up(tmp_path: Path) -> None:
    box, clock = inbox(tmp_path)
    write_frame(tmp_path, "a", make_frame(1))
    (tmp_path / "rgb" / "lonely.png").write_bytes(b"x")
    (tmp_path / "rgb" / "two.png").write_bytes(b"x")
    (tmp_path / "rgb" / "two.jpg").write_bytes(b"x")
    names(box)
    clock.now = 1.0
    assert names(box) == ["a"]
    assert box.complaint is None
    clock.now = 60.0
    names(box)
    assert "lonely.png (and 2 more) is no pair of one image and one cloud" in str(box.complaint)
    (tmp_path / "xyz" / "lonely.tiff").write_bytes(b"x")
    (tmp_path / "rgb" / "two.jpg").unlink()
    names(box)
    assert "two.png is no pair" in str(box.complaint)


def test_a_move_that_was_done_is_not_done_again(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "new" / "b"
    source.write_text("first")
    sources.move(source, target)
    assert not source.exists()
    source.write_text("another frame of the same name")
    sources.move(source, target)
    assert target.read_text() == "first"
    assert source.exists()


def test_between_file_systems_a_file_is_copied_whole_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("content")
    replace = os.replace

    def across(one: Path, other: Path) -> None:
        if Path(one) == source:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(one, other)

    monkeypatch.setattr(os, "replace", across)
    sources.move(source, target)
    assert target.read_text() == "content"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
