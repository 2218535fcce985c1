"""A bounded part of `make fuzz`, other cases than its first, and what it found before."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad.limits import Limits
from m3ad_plugins import ops
from m3ad_triton.frame_models import moved
from mutate import damaged_bytes, damaged_json
from run import SHARES, all_targets, cases_of, run
from sanitized import compiled
from sanitized import run as run_ops
from seeds import clouds, pictures

CASES = 1500


def test_nothing_but_sentences_comes_of_damage(
    tiny_bundle: Bundle, fused_repository: Path, tmp_path: Path
) -> None:
    found = all_targets(tmp_path, tiny_bundle, fused_repository)
    assert len(found) > 15
    for name, count in cases_of(list(found), CASES).items():
        outcome = run(name, found[name], range(10**9, 10**9 + count), 1)
        assert outcome.cases == count
        assert not outcome.failures, f"{name}: {outcome.failures}, again: --seed 1 --case {outcome.examples}"
        if count >= 35:  # else nothing would be tried but the first check
            assert outcome.taken > 0, name


def test_a_failure_is_counted_and_can_be_run_again() -> None:
    from random import Random

    def case(rng: Random) -> None:
        if rng.random() < 0.1:
            raise KeyError("lost")

    outcome = run("keys", case, range(200), 0)
    ((label, times),) = outcome.failures.items()
    assert label.startswith("KeyError at test_fuzz.py:")
    assert times == 200 - outcome.taken > 5
    with pytest.raises(KeyError):
        case(Random(f"0 keys {outcome.examples[label]}"))
    assert sum(SHARES.values()) == pytest.approx(100)


def test_every_sound_file_is_taken_before_it_is_damaged(tmp_path: Path) -> None:
    from m3ad.frames import read_frame
    from seeds import write

    write(tmp_path)
    for group, partner in ((pictures(), "sound.npy"), (clouds(), "sound.png")):
        for name, content in group.items():
            (tmp_path / name).write_bytes(content)
            pair = (tmp_path / name, tmp_path / partner)
            frame = read_frame(*(pair if partner == "sound.npy" else pair[::-1]))
            assert frame.rgb.shape == (12, 12, 3), name


def test_damage_follows_from_its_generator_alone() -> None:
    from random import Random

    content, document = pictures()["rgb.png"], {"a": [1, {"b": "c"}], "d": 0.5}
    for seed in range(50):
        assert damaged_bytes(Random(seed), content) == damaged_bytes(Random(seed), content)
        assert damaged_json(Random(seed), document) == damaged_json(Random(seed), document)
    assert document == {"a": [1, {"b": "c"}], "d": 0.5}
    assert len({damaged_json(Random(seed), document) for seed in range(200)}) > 100


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizers")
def test_the_ops_have_no_finding_under_sanitizers(tmp_path: Path) -> None:
    done = run_ops(compiled(tmp_path), 120, 1)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[:2000]
    assert "120 cases, 0 findings" in done.stdout


def test_a_sanitizer_would_tell(tmp_path: Path) -> None:
    """The same flags end a process that reads one element too many."""
    import subprocess

    from sanitized import FLAGS

    source = tmp_path / "wrong.cpp"
    source.write_text(
        "#include <vector>\nint main(int n, char**) { std::vector<int> v(n); return v.data()[n]; }\n"
    )
    subprocess.run(["g++", *FLAGS, str(source), "-o", str(tmp_path / "wrong")], check=True)
    done = subprocess.run([str(tmp_path / "wrong")], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_a_limit_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter `threshold` is 1000.*, expected a number"):
        moved(Limits(0.5), {"threshold": 10**400})


def test_points_whose_difference_overflows_are_sampled_in_any_order() -> None:
    points = np.zeros((200, 3), np.float32)
    points[::2, 0], points[1::2, 0] = 3.4e38, -3.4e38
    idx = ops.farthest_point_sample(points, 200)
    assert sorted(idx.tolist())[0] == 0
    assert idx[1] == 1
