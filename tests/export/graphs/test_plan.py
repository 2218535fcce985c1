import json
from pathlib import Path

import onnx
import pytest
from m3ad.errors import ArtifactError
from m3ad_export.graphs.plan import Keep, Plan, default_plan, read_plan


def node(name: str, domain: str = "") -> onnx.NodeProto:
    return onnx.helper.make_node("MatMul", ["a", "b"], ["c"], name=name, domain=domain)


def test_the_first_entry_that_matches_decides() -> None:
    plan = Plan("int8", "fp32", (Keep("fc1", "a", "int8_weights"), Keep("block", "b", "rest")))
    assert plan.choice("rgb", node("block.0.fc1/MatMul")).precision == "int8_weights"
    assert plan.choice("rgb", node("block.0.fc2/MatMul")).reason == "b"
    assert plan.choice("rgb", node("other")) == Keep("", "", "int8")
    assert plan.float_type("rgb", node("block.0.fc1/MatMul")) == "fp32"
    assert default_plan("int8", "fp16").float_type("mfm", node("first/Gemm")) == "fp16"
    assert default_plan("fp16").float_type("vm", node("anything")) == "fp32"
    assert default_plan("bf16").half == "bf16"
    assert default_plan("int8").half is None


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_every_entry_of_a_default_plan_has_a_reason_and_survives_its_file(
    precision: str, tmp_path: Path
) -> None:
    plan = default_plan(precision)  # type: ignore[arg-type]
    assert all(len(entry.reason) > 10 for entry in plan.keep)
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "int3"}, "precision must be one of fp16, bf16, int8, fp8"),
        ({"keep": [{"pattern": "(", "reason": "r"}]}, "is not a pattern"),
        ({"keep": [{"pattern": "x", "reason": "r", "precision": "fp7"}]}, "has the precision 'fp7'"),
        ({"keep": [{"pattern": "x", "reason": "r", "precison": "fp16"}]}, "unexpected keyword argument"),
        ({"rest": "fp16", "keep": [{"pattern": "x", "reason": "r", "precision": "bf16"}]}, "one half type"),
        ({"keep": [{"pa\x1b[2Jern": "x"}]}, r"unexpected keyword argument 'pa\?\[2Jern'"),
        ({"kept": []}, "has unknown entries: kept"),
        ({"ke\x07pt": []}, r"has unknown entries: ke\?pt"),
        ({"format": "else"}, "is no m3ad-precision-plan"),
    ],
)
def test_a_damaged_plan_is_explained(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**default_plan("int8").to_json(), **change}))
    with pytest.raises(ArtifactError, match=words):
        read_plan(path)


def test_a_missing_or_broken_file_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"cannot be read .No such file.* Write one to start from: m3ad-calibrate plan"
    ):
        read_plan(tmp_path / "none.json")
    for text in ("{", "[" * 100_000, '{"keep": ' + "9" * 5000 + "}", '{"rest": NaN}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ArtifactError, match="is not valid JSON"):
            read_plan(tmp_path / "plan.json")
