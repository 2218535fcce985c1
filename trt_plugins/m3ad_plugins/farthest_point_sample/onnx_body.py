"""The function body of FarthestPointSample; `onnx_functions` says what holds for all."""

# The row round ArgMax: TensorRT's wants two dimensions. The first sample is 0 times a pixel: the result does not depend
# on point_pixel, but a parser may drop a graph input that no node reads, and whoever then binds it is refused.
BODY = """
<num_samples, min_norm_sq> (points, point_pixel) => (idx) {
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
    pixel = Gather <axis = 0> (point_pixel, axis0)
    pixel64 = Cast <to = 7> (pixel)
    point_0 = Mul (pixel64, axis0)
    trips = Constant <value_int: int = @num_samples> ()
    always = Constant <value = bool {1}> ()
    closest_last, picked_last, picks = Loop (trips, always, unsampled, point_0) <body = pick_one (
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
