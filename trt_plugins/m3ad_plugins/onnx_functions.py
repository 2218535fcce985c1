"""The m3ad ops as ONNX functions of standard ops (opset 18): they travel inside the model for any ONNX runtime.

The bodies follow `reference` step by step: direct fp32 differences, ties to the lowest index. Distances and
features are formed in chunks, so that no [N, G] or [pixels, D] matrix exists. A runtime with a kernel for the op
takes that instead (TensorRT prefers a registered plugin to a function of the same name since 10.7).
"""

from typing import TYPE_CHECKING

from m3ad.contract import OP_DOMAIN, OPS

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

# Points go 512 at a time through the 3-NN search, channels 64 at a time through P X P^T; both are filled up with 0.
_TOKEN_INTERPOLATE = """
<image_size> (points, point_pixel, centers, tokens) => (rows, scored_pixel) {
    axis0 = Constant <value_int = 0> ()
    axis1 = Constant <value_int = 1> ()
    axis2 = Constant <value_int = 2> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    third = Constant <value_ints = [2]> ()
    any = Constant <value_ints = [-1]> ()
    three = Constant <value_ints = [3]> ()
    chunk = Constant <value_ints = [512]> ()
    chunked = Constant <value_ints = [-1, 512, 3]> ()
    threes = Constant <value_ints = [-1, 3]> ()
    eps = Constant <value_float = 1.0e-8> ()

    points_shape = Shape (points)
    count = Slice (points_shape, first, second)
    over = Mod (count, chunk)
    short = Sub (chunk, over)
    fill_points = Concat <axis = 0> (first, first, short, first)
    filled_points = Pad (points, fill_points)
    chunks = Reshape (filled_points, chunked)
    cx = Gather <axis = 1> (centers, axis0)
    cy = Gather <axis = 1> (centers, axis1)
    cz = Gather <axis = 1> (centers, axis2)
    unused = Constant <value_float = 0.0> ()
    unused_last, nearest_chunks, weight_chunks = Scan <num_scan_inputs = 1, body = three_nearest (
        float unused_in, float[512, 3] part
    ) => (float unused_out, int64[512, 3] nearest, float[512, 3] weight) {
        unused_out = Identity (unused_in)
        x = Slice (part, first, second, second)
        y = Slice (part, second, third, second)
        z = Slice (part, third, three, second)
        dx = Sub (x, cx)
        dy = Sub (y, cy)
        dz = Sub (z, cz)
        dxx = Mul (dx, dx)
        dyy = Mul (dy, dy)
        dzz = Mul (dz, dz)
        dxy = Add (dxx, dyy)
        distance = Add (dxy, dzz)
        near, nearest = TopK <axis = 1, largest = 0, sorted = 1> (distance, three)
        damped = Add (near, eps)
        inverse = Reciprocal (damped)
        total = ReduceSum <keepdims = 1> (inverse, second)
        weight = Div (inverse, total)
    }> (unused, chunks)
    nearest_rows = Reshape (nearest_chunks, threes)
    weight_rows = Reshape (weight_chunks, threes)
    point_nearest = Slice (nearest_rows, first, count, first)
    point_weight = Slice (weight_rows, first, count, first)

    size = Constant <value_int: int = @image_size> ()
    size_dim = Unsqueeze (size, first)
    pixels = Mul (size_dim, size_dim)
    per_pixel = Concat <axis = 0> (pixels, three)
    no_token = ConstantOfShape <value = int64[1] {0}> (per_pixel)
    no_weight = ConstantOfShape <value = float[1] {0.0}> (per_pixel)
    empty = ConstantOfShape <value = float[1] {0.0}> (pixels)
    full = ConstantOfShape <value = float[1] {1.0}> (count)
    pixel64 = Cast <to = 7> (point_pixel)
    where = Unsqueeze (pixel64, second)
    pixel_nearest = ScatterND (no_token, where, point_nearest)
    pixel_weight = ScatterND (no_weight, where, point_weight)
    foreground_row = ScatterND (empty, where, full)

    inner = Sub (size, axis2)
    one = Constant <value_int = 1> ()
    out1 = Range (axis0, size, one)
    out = Unsqueeze (out1, second)
    mid = Range (axis0, inner, one)
    out_next = Add (out, one)
    start_scaled = Mul (out, inner)
    start = Div (start_scaled, size)
    stop_scaled = Mul (out_next, inner)
    almost = Sub (size, one)
    stop_raised = Add (stop_scaled, almost)
    stop = Div (stop_raised, size)
    from_start = GreaterOrEqual (mid, start)
    to_stop = Less (mid, stop)
    in_window = And (from_start, to_stop)
    window = Cast <to = 1> (in_window)
    width = ReduceSum <keepdims = 1> (window, second)
    adaptive = Div (window, width)
    mid_row = Unsqueeze (mid, second)
    offset = Sub (out1, mid_row)
    not_left = GreaterOrEqual (offset, axis0)
    not_right = LessOrEqual (offset, axis2)
    in_kernel = And (not_left, not_right)
    kernel = Cast <to = 1> (in_kernel)
    three_wide = Constant <value_float = 3.0> ()
    average = Div (kernel, three_wide)
    pool = MatMul (adaptive, average)
    zero = Constant <value_float = 0.0> ()
    is_tap = Greater (pool, zero)
    taps = Cast <to = 1> (is_tap)
    taps_across = Transpose <perm = [1, 0]> (taps)
    square = Concat <axis = 0> (size_dim, size_dim)
    foreground = Reshape (foreground_row, square)
    reached_down = MatMul (taps, foreground)
    reached = MatMul (reached_down, taps_across)
    reached_row = Reshape (reached, any)
    is_scored = Greater (reached_row, zero)
    scored_2d = NonZero (is_scored)
    scored64 = Squeeze (scored_2d, first)

    tokens32 = Cast <to = 1> (tokens)
    tokens_shape = Shape (tokens)
    group_dim = Slice (tokens_shape, first, second)
    channels = Slice (tokens_shape, second, third)
    block = Constant <value_ints = [64]> ()
    channels_over = Mod (channels, block)
    channels_short = Sub (block, channels_over)
    fill_channels = Concat <axis = 0> (first, first, first, channels_short)
    filled_tokens = Pad (tokens32, fill_channels)
    in_blocks = Concat <axis = 0> (group_dim, any, block)
    blocked_tokens = Reshape (filled_tokens, in_blocks)
    token_blocks = Transpose <perm = [1, 0, 2]> (blocked_tokens)
    near0 = Gather <axis = 1> (pixel_nearest, axis0)
    near1 = Gather <axis = 1> (pixel_nearest, axis1)
    near2 = Gather <axis = 1> (pixel_nearest, axis2)
    weight0 = Slice (pixel_weight, first, second, second)
    weight1 = Slice (pixel_weight, second, third, second)
    weight2 = Slice (pixel_weight, third, three, second)
    image_rows = Concat <axis = 0> (size_dim, any)
    image_pixels = Concat <axis = 0> (size_dim, size_dim, block)
    flat_pixels = Concat <axis = 0> (any, block)
    unused_final, row_blocks = Scan <num_scan_inputs = 1, body = pool_block (
        float unused_before, float[G, 64] token_block
    ) => (float unused_after, float[R, 64] pooled_rows) {
        unused_after = Identity (unused_before)
        token0 = Gather <axis = 0> (token_block, near0)
        token1 = Gather <axis = 0> (token_block, near1)
        token2 = Gather <axis = 0> (token_block, near2)
        part0 = Mul (token0, weight0)
        part1 = Mul (token1, weight1)
        part2 = Mul (token2, weight2)
        part01 = Add (part0, part1)
        feature = Add (part01, part2)
        feature_rows = Reshape (feature, image_rows)
        pooled_down = MatMul (pool, feature_rows)
        pooled_pixels = Reshape (pooled_down, image_pixels)
        pooled = MatMul (pool, pooled_pixels)
        pooled_flat = Reshape (pooled, flat_pixels)
        pooled_rows = Gather <axis = 0> (pooled_flat, scored64)
    }> (unused, token_blocks)
    rows_blocked = Transpose <perm = [1, 0, 2]> (row_blocks)
    keep_rows = Constant <value_ints = [0, -1]> ()
    rows_filled = Reshape (rows_blocked, keep_rows)
    rows32 = Slice (rows_filled, first, channels, second)
    rows = CastLike (rows32, tokens)
    scored_pixel = Cast <to = 6> (scored64)
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
    "TokenInterpolate": _TOKEN_INTERPOLATE,
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
