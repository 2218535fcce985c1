"""Arguments and options that several commands of `m3ad-calibrate` take."""

from pathlib import Path
from typing import Annotated

import typer
from m3ad_export.graphs.plan import PlanPrecision, Rest

from m3ad_calibrate.ranges import EightBits, Method

BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-export bundle` wrote")]
DataOpt = Annotated[Path, typer.Option(help="a category in MVTec 3D-AD or Eyecandies layout")]
PrecisionOpt = Annotated[PlanPrecision, typer.Option(help="fp16, bf16, int8 or fp8")]
EightBitsOpt = Annotated[EightBits, typer.Option("--precision", help="int8 or fp8")]
MethodOpt = Annotated[Method, typer.Option(help="how activations' limits are chosen")]
RestOpt = Annotated[
    Rest, typer.Option(help="type of what INT8 and FP8 are not for: fp32 for CPUs, fp16 for TensorRT")
]
SmoothOpt = Annotated[
    bool, typer.Option("--smoothquant", help="move outliers behind LayerNorms into the weights")
]
FramesOpt = Annotated[int, typer.Option(min=1, help="good validation frames, each also with a defect")]
BudgetOpt = Annotated[float, typer.Option(min=0, help="how far each anomaly metric may fall")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
