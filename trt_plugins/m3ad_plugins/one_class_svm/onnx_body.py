"""The function bodies of OneClassSvm; `onnx_functions` says what holds for all."""

# By kernel: standard ops cannot choose by a string attribute on every runtime.
LINEAR = """
<kernel, gamma> (x, support_vectors, coefficients, rho) => (decision) {
    weighted = MatMul (coefficients, support_vectors)
    product = MatMul (x, weighted)
    decision = Sub (product, rho)
}"""

RBF = """
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

BODY = {"linear": LINEAR, "rbf": RBF}
