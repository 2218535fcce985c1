//! Sparse rows times tokens, and the scores of such rows, on plain pointers; reference.py is the
//! specification. Inputs are already checked (__init__.py).
#pragma once

#include <cstdint>

namespace m3ad {

//! Row r is indices and weights [indptr[r] .. indptr[r + 1] - 1].
struct SparseRows {
    int32_t const* indptr;
    int32_t const* indices;
    float const* weights;
};

//! out [rows, width] = the sparse rows times tokens [groups, width].
void applyRows(SparseRows const& a, int32_t rows, float const* tokens, int32_t width, float* out,
               int32_t threads);

//! Rows [rows, width]: the sparse rows times tokens `values`, or `values` themselves where indptr is null.
struct Features {
    SparseRows rows;
    float const* values;
};

//! Rows [rows, width] in blocks of columns: block b is [rows, widths[b]], and the widths add up to `width`.
struct Blocks {
    float const* const* values;
    int32_t const* widths;
    int32_t count;
    int32_t width;
};

//! scores [pairs, rows] = |F/|F| - F~/|F~||^2 / 2 of each pair of features F and reconstructed F~.
void cosineScores(Features const* features, Blocks const* reconstructed, int32_t pairs, int32_t rows,
                  float* scores, int32_t threads);

} // namespace m3ad
