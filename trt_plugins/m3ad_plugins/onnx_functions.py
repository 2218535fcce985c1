"""The m3ad ops as ONNX functions of standard ops (opset 18): they travel inside the model for any ONNX runtime.

The bodies follow `reference` step by step: direct fp32 differences, ties to the lowest index. Distances and
features are formed in chunks, so that no [N, G] or [pixels, D] matrix exists. A runtime with a kernel for the op
takes that instead (TensorRT prefers a registered plugin to a function of the same name since 10.7).
"""

from typing import TYPE_CHECKING

from m3ad.contract import OP_DOMAIN, OPS

from m3ad_plugins.onnx_interpolate import TOKEN_INTERPOLATE

if TYPE_CHECKING:
    import onnx

OPSET = 18

# The row round ArgMax: TensorRT's wants two dimensions.
_FARTHEST_POINT_SAMPLE = """
<num_samples, min_norm_sq> (points) => (idx) {
    axis0 = Constant <value_int = 0> ()
    axis1 = Constant <value_int = 1> ()
    axis2 = Constant <value_int = 2> ()
    first = Constant <value_ints = [0]> ()
    x = Gather <axis = 1> (points, axis0)
    y = Gather <axis = 1> (points, axis1)
    z = Gather <axis = 1> (points, axis2)
    xx = Mul (x, x)
    yy = Mul (y, y)
    zz = Mul (z, z)
    xxyy = Add (xx, yy)
    norm_sq = Add (xxyy, zz)
    limit = Constant <value_float: float = @min_norm_sq> ()
    zero = Constant <value_float = 0.0> ()
    never = Constant <value_float = -1.0> ()
    far = Constant <value_float = 3.4028234e38> ()
    has_limit = Greater (limit, zero)
    within = LessOrEqual (norm_sq, limit)
    skipped = And (within, has_limit)
    unsampled = Where (skipped, never, far)
    trips = Constant <value_int: int = @num_samples> ()
    always = Constant <value = bool {1}> ()
    closest_last, picked_last, picks = Loop (trips, always, unsampled, axis0) <body = pick_one (
        int64 step, bool go, float[N] closest, int64 picked
    ) => (bool go_on, float[N] closer, int64 farthest, int64 pick) {
        go_on = Identity (go)
        pick = Identity (picked)
        px = Gather <axis = 0> (x, picked)
        py = Gather <axis = 0> (y, picked)
        pz = Gather <axis = 0> (z, picked)
        dx = Sub (x, px)
        dy = Sub (y, py)
        dz = Sub (z, pz)
        dxx = Mul (dx, dx)
        dyy = Mul (dy, dy)
        dzz = Mul (dz, dz)
        dxy = Add (dxx, dyy)
        distance = Add (dxy, dzz)
        closer = Min (closest, distance)
        closer_row = Unsqueeze (closer, first)
        farthest_row = ArgMax <axis = 1, keepdims = 0> (closer_row)
        farthest = Squeeze (farthest_row, first)
    }>
    idx = Cast <to = 6> (picks)
}"""

# Centres go 16 at a time, the last chunk filled up with point 0. The unused state: TensorRT takes no Scan without.
_KNN_GROUP = """
<group_size> (points, idx) => (neighborhood, knn_idx) {
    axis0 = Constant <value_int = 0> ()
    axis1 = Constant <value_int = 1> ()
    axis2 = Constant <value_int = 2> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    chunk = Constant <value_ints = [16]> ()
    chunked = Constant <value_ints = [-1, 16]> ()
    group_size = Constant <value_int: int = @group_size> ()
    group_dim = Unsqueeze (group_size, first)
    x = Gather <axis = 1> (points, axis0)
    y = Gather <axis = 1> (points, axis1)
    z = Gather <axis = 1> (points, axis2)
    idx64 = Cast <to = 7> (idx)
    groups = Shape (idx64)
    over = Mod (groups, chunk)
    short = Sub (chunk, over)
    none_before = Concat <axis = 0> (first, short)
    filled = Pad (idx64, none_before)
    chunks = Reshape (filled, chunked)
    unused = Constant <value_float = 0.0> ()
    unused_last, nearest_chunks = Scan <num_scan_inputs = 1, body = nearest_of_chunk (
        float unused_in, int64[16] members
    ) => (float unused_out, int64[16, S] nearest) {
        unused_out = Identity (unused_in)
        cx1 = Gather <axis = 0> (x, members)
        cy1 = Gather <axis = 0> (y, members)
        cz1 = Gather <axis = 0> (z, members)
        cx = Unsqueeze (cx1, second)
        cy = Unsqueeze (cy1, second)
        cz = Unsqueeze (cz1, second)
        dx = Sub (x, cx)
        dy = Sub (y, cy)
        dz = Sub (z, cz)
        dxx = Mul (dx, dx)
        dyy = Mul (dy, dy)
        dzz = Mul (dz, dz)
        dxy = Add (dxx, dyy)
        distance = Add (dxy, dzz)
        farness, nearest = TopK <axis = 1, largest = 0, sorted = 1> (distance, group_dim)
    }> (unused, chunks)
    any_rows = Constant <value_ints = [-1]> ()
    rows_of_group = Concat <axis = 0> (any_rows, group_dim)
    nearest_rows = Reshape (nearest_chunks, rows_of_group)
    knn64 = Slice (nearest_rows, first, groups, first)
    members_xyz = Gather <axis = 0> (points, knn64)
    centers = Gather <axis = 0> (points, idx64)
    centers_row = Unsqueeze (centers, second)
    neighborhood = Sub (members_xyz, centers_row)
    knn_idx = Cast <to = 6> (knn64)
}"""

_LINEAR_SVM = """
<kernel, gamma> (x, support_vectors, coefficients, rho) => (decision) {
    weighted = MatMul (coefficients, support_vectors)
    product = MatMul (x, weighted)
    decision = Sub (product, rho)
}"""

_RBF_SVM = """
<kernel, gamma> (x, support_vectors, coefficients, rho) => (decision) {
    second = Constant <value_ints = [1]> ()
    gamma = Constant <value_float: float = @gamma> ()
    slope = Neg (gamma)
    none = ReduceSum <keepdims = 0> (x, second)
    zero = Constant <value_float = 0.0> ()
    start = Mul (none, zero)
    total = Scan <num_scan_inputs = 2, body = add_vector (
        float[R] so_far, float[D] vector, float coefficient
    ) => (float[R] sum) {
        difference = Sub (x, vector)
        squares = Mul (difference, difference)
        distance = ReduceSum <keepdims = 0> (squares, second)
        exponent = Mul (distance, slope)
        similarity = Exp (exponent)
        share = Mul (similarity, coefficient)
        sum = Add (so_far, share)
    }> (start, support_vectors, coefficients)
    decision = Sub (total, rho)
}"""

_BODIES = {
    "FarthestPointSample": _FARTHEST_POINT_SAMPLE,
    "KnnGroup": _KNN_GROUP,
    "TokenInterpolate": TOKEN_INTERPOLATE,
}
_SVM_BODIES = {"linear": _LINEAR_SVM, "rbf": _RBF_SVM}


def function_protos(svm_kernel: str = "linear") -> list["onnx.FunctionProto"]:
    """The functions of the four ops, in the order of the contract.

    Args:
        svm_kernel: the kernel whose body OneClassSvm gets (standard ops cannot choose by a string attribute on
            every runtime); nodes of that op must carry the same value.

    Returns:
        Functions of domain `m3ad` over opset 18; TokenInterpolate returns rows of the tokens' type.

    Raises:
        ValueError: the kernel is neither "linear" nor "rbf".
    """
    from onnx import parser

    if svm_kernel not in _SVM_BODIES:
        raise ValueError(f"svm_kernel: expected one of {', '.join(_SVM_BODIES)}, got {svm_kernel!r}")
    bodies = {**_BODIES, "OneClassSvm": _SVM_BODIES[svm_kernel]}
    head = f'<opset_import: ["" : {OPSET}], domain: "{OP_DOMAIN}">\n'
    return [parser.parse_function(head + name + bodies[name]) for name in OPS]
