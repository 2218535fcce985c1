"""The m3ad ops as ONNX functions of standard ops (opset 18): they travel inside the model for any ONNX runtime.

Each op's `onnx_body.py` follows its `reference.py` step by step: direct fp32 differences, ties to the lowest index.
Distances and features are formed in chunks, so that no [N, G] or [pixels, D] matrix exists. A runtime with a kernel for
the op takes that instead (TensorRT prefers a registered plugin to a function of the same name since 10.7).
"""

import re
from importlib import import_module
from typing import TYPE_CHECKING

from m3ad.contract import OP_DOMAIN, OPS

from m3ad_plugins.one_class_svm import KERNELS

if TYPE_CHECKING:
    import onnx

OPSET = 18


def folder_of(op: str) -> str:
    """The folder of an op of the contract, which is a package here: KnnGroup -> knn_group."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", op).lower()


def function_protos(svm_kernel: str = "linear") -> list["onnx.FunctionProto"]:
    """The functions of the ops, in the order of the contract.

    Args:
        svm_kernel: the kernel whose body OneClassSvm gets (standard ops cannot choose by a string attribute on
            every runtime); nodes of that op must carry the same value.

    Returns:
        Functions of domain `m3ad` over opset 18; TokenInterpolate returns rows of the tokens' type.

    Raises:
        ValueError: the kernel is neither "linear" nor "rbf".
    """
    from onnx import parser

    if svm_kernel not in KERNELS:
        raise ValueError(f"svm_kernel: expected one of {', '.join(KERNELS)}, got {svm_kernel!r}")
    functions = []
    for op in OPS:
        body = import_module(f"m3ad_plugins.{folder_of(op)}.onnx_body").BODY
        text = body if isinstance(body, str) else body[svm_kernel]
        functions.append(
            parser.parse_function(f'<opset_import: ["" : {OPSET}], domain: "{OP_DOMAIN}">\n{op}{text}')
        )
    return functions
