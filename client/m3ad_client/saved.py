"""Saved results of `eval --json` and `bench --json`, read again: every entry a table is made of is looked at first."""

from pathlib import Path
from typing import Annotated, Any

from m3ad.errors import ArtifactError
from m3ad.scored import Lattice
from m3ad.typed_json import read_json, typed
from msgspec import UNSET, Meta, Struct, UnsetType

Text = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]  # what a terminal shows as it is
Numbers = dict[Text, float]


class Verdicts(Struct):
    """How many parts were called what at the threshold."""

    found: float
    missed: float
    false_alarms: float
    passed: float


class ScoreMap(Struct):
    """Metrics of one score map alone."""

    image_auroc: float
    pixel_auroc: float | UnsetType = UNSET


class Evaluation(Struct):
    """What `eval --json` writes, as far as its tables show it."""

    category: Text
    split: Text
    weights: Text
    frames: float
    threshold: float
    metrics: Numbers
    per_defect: dict[Text, Numbers]
    verdicts: Verdicts
    score_maps: dict[Text, ScoreMap] = {}
    without_mask: dict[Text, int] = {}

    def __post_init__(self) -> None:
        if unknown := self.without_mask.keys() - self.per_defect.keys():
            raise ValueError(f"`without_mask` names `{min(unknown)}`, which `per_defect` has not")
        # Kinds of defects without a mask have no metrics by pixel.
        for kind, values in self.per_defect.items():
            needed = self.metrics.keys() if kind not in self.without_mask else {"image_auroc"}
            if missing := ({"frames"} | needed) - values.keys():
                raise ValueError(f"`per_defect` `{kind}` has no `{min(missing)}`")


class Row(Struct):
    """A form in one region, with the conditions it was measured under."""

    name: Text
    region: Text
    how: Text
    hardware: Text
    device: Text
    runtime: Text
    precision: Text
    weights: Text
    frames_per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    load_before: float
    frames: float
    warmup_frames: float
    mean_points: float
    threads: float | None
    cold_start_ms: float | None
    map_max_error: float | None
    lattice: Lattice = "all"  # older documents have none of these
    refined: bool = False
    beside: float = 0
    map_largest: float | None = None


class Stage(Struct):
    """A stage's share of a frame."""

    run: Text
    stage: Text
    uses: float
    infer_ms: float
    queue_ms: float
    transfer_ms: float


class Growth(Struct):
    """Resident memory after the last frame less that after an early one."""

    frames: float
    bytes: float


class Memory(Struct):
    """What a form holds."""

    parameter_bytes: float | None
    device_bytes: float | None
    peak: dict[Text, float | None] | None
    growth: Growth | None = None


class FrameEnergy(Struct):
    """What a frame takes of the board's power."""

    source: Text
    frames: float
    watts: float
    joules_per_frame: float


class Spread(Struct):
    """Lowest and highest ratio of a frame."""

    low: float
    high: float


class Engine(Struct):
    """What building a target's engines took and what they weigh."""

    precision: Text
    build_s: float
    bytes: float


class Artefacts(Struct):
    """What making the bundle took and what it weighs."""

    export_s: float
    onnx_bytes: float
    engines: dict[Text, Engine]


class Paper(Struct):
    """The paper's efficiency table."""

    source: Text
    measured_on: Text
    columns: list[Text]
    rows: list[list[Text | float]]
    caveats: list[Text]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"`rows` are not all of its {len(self.columns)} columns")


class Bench(Struct):
    """What `bench --json` writes, as far as its tables show it."""

    rows: list[Row]
    ratios: Numbers
    ratio_spread: dict[Text, Spread]
    stages: list[Stage]
    memory: dict[Text, Memory]
    paper: Paper
    artefacts: Artefacts | UnsetType = UNSET
    energy: dict[Text, FrameEnergy] | UnsetType = UNSET
    energy_not_measured: Text | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        if missing := [name for name in self.ratios if name not in self.ratio_spread]:
            raise ValueError(f"`ratio_spread` lacks `{missing[0]}`, which `ratios` has")


def read_result(path: Path) -> dict[str, Any]:
    """What `eval --json` or `bench --json` wrote to `path`: `rows` are in the latter alone, `metrics` in the former.

    Raises:
        ArtifactError: it cannot be read, is something else, or has an entry that no table can show.
    """
    document = read_json(path, "Write one with `m3ad-client eval --json` or `bench --json`")
    source = f"{path}, a result of `m3ad-client"
    if not isinstance(document, dict):
        document = {}
    if document.get("rows") and {"ratios", "paper"} <= document.keys():
        typed(document, Bench, f"{source} bench --json`,", "Write it again")
        return {name: value for name, value in document.items() if name != "metrics"}
    if "metrics" in document:
        typed(document, Evaluation, f"{source} eval --json`,", "Write it again")
        return {name: value for name, value in document.items() if name != "rows"}
    raise ArtifactError(f"{path} is not a result of `m3ad-client eval --json` or `bench --json` of this m3ad")
