"""The function body of NearestRow; `onnx_functions` says what holds for all.

Candidates come from one product, x b - |b|^2 / 2 about the bank's mean, which is largest where the distance is least;
the four best are measured again directly, so that a product of lower precision changes nothing. In fp32: of two rows
that are as near as fp32 can tell, the lower one. What follows from the bank alone a runtime folds.
"""

BODY = """
(x, bank) => (distance, idx) {
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    third = Constant <value_ints = [2]> ()
    mean = ReduceMean <keepdims = 1> (bank, first)
    rows = Sub (bank, mean)
    squares = Mul (rows, rows)
    norms = ReduceSum <keepdims = 0> (squares, second)
    half = Constant <value_float = 0.5> ()
    half_norms = Mul (norms, half)
    turned = Transpose <perm = [1, 0]> (rows)
    queries = Sub (x, mean)
    product = MatMul (queries, turned)
    scores = Sub (product, half_norms)
    all = Shape <start = 0, end = 1> (bank)
    four = Constant <value_ints = [4]> ()
    count = Min (all, four)
    best, candidates = TopK <axis = 1, largest = 1> (scores, count)
    picked = Gather <axis = 0> (bank, candidates)
    asked = Unsqueeze (x, second)
    differences = Sub (asked, picked)
    terms = Mul (differences, differences)
    sums = ReduceSum <keepdims = 0> (terms, third)
    distances = Sqrt (sums)
    nearest = ReduceMin <keepdims = 1> (distances, second)
    is_nearest = Equal (distances, nearest)
    named = Where (is_nearest, candidates, all)
    lowest = ReduceMin <keepdims = 0> (named, second)
    idx = Cast <to = 6> (lowest)
    distance = Squeeze (nearest, second)
}"""
