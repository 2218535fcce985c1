"""The precision plan: which type every node of the dense subgraphs computes in, and why. One notion for all types.

A plan is a JSON file that people read and edit. Its entries are searched from the top, the first that matches a node
decides; what no entry matches gets the plan's precision. INT8 is for matrix products and convolutions with weights, FP8
for matrix products: every other node computes in the plan's `rest`.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
from m3ad.bundle import write_json
from m3ad.contract import OP_DOMAIN
from m3ad.errors import ArtifactError, one_line
from m3ad.typed_json import read_json

# `int8_weights`: the weights are stored in INT8, the product itself runs in the plan's rest.
NodePrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int8_weights", "rest"]
PlanPrecision = Literal["fp16", "bf16", "int8", "fp8"]
HalfPrecision = Literal["fp16", "bf16"]
Rest = Literal["fp32", "fp16", "bf16"]
PLAN_FORMAT = "m3ad-precision-plan"
QUANTIZED = ("int8", "fp8", "int8_weights")


@dataclass(frozen=True, slots=True)
class Keep:
    """Nodes that get another precision than the plan's: a pattern searched in `<stage>:<node name>`, and the reason."""

    pattern: str
    reason: str
    precision: NodePrecision = "fp32"


# Names are `module/operation/OpType`, as the exporter writes them.
KEEP_FP32: tuple[Keep, ...] = (
    Keep(
        r"^(vm|vote|head_scores|head_vote):",
        "scores lie near 1 - cos = 0, where fp16 steps are as large as the signal; voting multiplies them",
    ),
    Keep(
        r"^head_tokens:\w+_rotation/", "the features that are compared: what they lose is taken for a defect"
    ),
    Keep(r"^project:", "distances to centres decide the weights; 3-NN in fp16 loses its true neighbours"),
    Keep(r"^bank:", "rows that are nearly as near as others change places, and the nearest one is the score"),
    Keep(r"^dictionary:", "neighbours that are nearly as near as others change places"),
    Keep(r":normalise/", "a patch's points are millimetres about its centre"),
    Keep(r"/LayerNormalization", "sums of squares over wide rows overflow fp16"),
    Keep(r"/Softmax", "exponentials overflow; TensorRT fuses an fp32 softmax into attention"),
    Keep(
        r":blocks[\w.]*\.\d+/add", "the residual stream of a ViT grows beyond what fp16 holds on some builds"
    ),
    Keep(r"/(linalg_vector_norm|clamp_min|expand|div)\w*/", "L2 norms of feature rows"),
    Keep(
        r":encoder(\.first_conv|/linear/)",
        "neighbourhoods are offsets of millimetres, their variance about 1e-6",
    ),
    Keep(r":encoder\.second_conv\.[01]/", "batch statistics over all grouped points"),
    Keep(
        r":couplings\.\d+/", "a flow's latents grow by exp from coupling to coupling and are clamped at 1e6"
    ),
    Keep(r":pos_embed", "absolute coordinates in metres: fp16 would round them to a quarter millimetre"),
    Keep(rf":{OP_DOMAIN}\.", "the custom ops measure distances in fp32"),
)

KEEP_FROM_EIGHT_BITS: tuple[Keep, ...] = (
    Keep(
        r"\.attn/matmul",
        "products of two activations: no fused INT8 attention beyond 512 tokens, and softmax outputs crowd near zero",
        "rest",
    ),
    Keep(r":patch_embed", "reads the pixels themselves, one hundredth of the encoder's work", "rest"),
    Keep(
        r":(network\.conv1|stem|_conv_stem)/",
        "reads the pixels themselves, little of the network's work",
        "rest",
    ),
    Keep(r"\._depthwise_conv/", "a few weights a channel, limited by memory: nothing is gained", "rest"),
    Keep(r"\._se_(reduce|expand)/", "one pixel of channel means, by which all others are multiplied", "rest"),
    Keep(r":pool(s\.)?\d+/", "means over cells, of next to no work", "rest"),
    Keep(
        r":decoder\.(conv_decoder|decoder|attention)\.",
        "CMDR-IAD's convolutions: what INT8 costs them was not measured",
        "rest",
    ),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `m3ad-calibrate quantize` writes into the ONNX files.

    Attributes:
        precision: of every node that no entry keeps.
        rest: of what INT8 and FP8 are not for; a half type for TensorRT, fp32 for CPUs.
        keep: searched in order.

    Raises:
        ValueError: an unknown precision, a pattern that does not compile, or two half types in one plan.
    """

    precision: PlanPrecision
    rest: Rest
    keep: tuple[Keep, ...]

    def __post_init__(self) -> None:
        if self.precision not in get_args(PlanPrecision) or self.rest not in get_args(Rest):
            raise ValueError(
                f"precision must be one of {', '.join(get_args(PlanPrecision))} and rest one of "
                f"{', '.join(get_args(Rest))}, got {self.precision!r} and {self.rest!r}"
            )
        for entry in self.keep:
            if entry.precision not in get_args(NodePrecision):
                raise ValueError(
                    f"{entry.pattern!r} has the precision {entry.precision!r}, expected one of "
                    f"{', '.join(get_args(NodePrecision))}"
                )
            try:
                re.compile(entry.pattern)
            except re.error as error:
                raise ValueError(f"{entry.pattern!r} is not a pattern: {error}") from error
        if self.precision in get_args(HalfPrecision) and self.rest != self.precision:
            raise ValueError(f"a plan for {self.precision} has no other rest, got {self.rest}")
        if len(halves := self._halves()) > 1:
            raise ValueError(f"a plan holds one half type, got {' and '.join(sorted(halves))}")

    @property
    def half(self) -> HalfPrecision | None:
        """The half type that nodes of this plan compute in, if any does."""
        return next(iter(self._halves()), None)

    def _halves(self) -> set[HalfPrecision]:
        chosen = {self.precision, self.rest, *(entry.precision for entry in self.keep)}
        return {half for half in get_args(HalfPrecision) if half in chosen}

    def choice(self, stage: str, node: onnx.NodeProto) -> Keep:
        """The entry that decides a node; one with an empty pattern where none matches."""
        name = f"{stage}:{OP_DOMAIN}." if node.domain == OP_DOMAIN else f"{stage}:{node.name}"
        found = next((entry for entry in self.keep if re.search(entry.pattern, name)), None)
        return found or Keep("", "", self.precision)

    def float_type(self, stage: str, node: onnx.NodeProto) -> Rest:
        """The floating type a node computes in, or reads and writes where its products are INT8 or FP8."""
        chosen = self.choice(stage, node).precision
        return chosen if chosen in ("fp32", "fp16", "bf16") else self.rest

    def to_json(self) -> dict[str, Any]:
        """The plan as it stands in its file."""
        return {
            "format": PLAN_FORMAT,
            "precision": self.precision,
            "rest": self.rest,
            "keep": [asdict(k) for k in self.keep],
        }

    def write(self, path: Path) -> None:
        """Write the plan's file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())


def default_plan(precision: PlanPrecision, rest: Rest = "fp32") -> Plan:
    """What is known to need more than the precision, before anything was measured."""
    if precision in ("int8", "fp8"):
        return Plan(precision, rest, (*KEEP_FP32, *KEEP_FROM_EIGHT_BITS))
    half: Rest = "fp16" if precision == "fp16" else "bf16"
    return Plan(precision, half, KEEP_FP32)


def read_plan(path: Path) -> Plan:
    """Read a plan's file.

    Raises:
        ArtifactError: there is none, or it is no plan.
    """
    advice = "m3ad-calibrate plan writes one to start from"
    document = read_json(path, "Write one to start from: m3ad-calibrate plan")
    if not isinstance(document, dict) or document.get("format") != PLAN_FORMAT:
        raise ArtifactError(f"{path} is no {PLAN_FORMAT}; {advice}")
    try:
        keep = tuple(Keep(**entry) for entry in document["keep"])
        plan = Plan(document["precision"], document["rest"], keep)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is a damaged plan: {one_line(error)}; {advice}") from error
    if odd := sorted(document.keys() - plan.to_json().keys()):
        raise ArtifactError(f"{path} has unknown entries: {one_line(', '.join(odd))}; {advice}")
    return plan
