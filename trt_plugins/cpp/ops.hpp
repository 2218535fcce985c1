//! The portable ops on plain pointers: what native.py calls through ops_c.cpp and the C++ and GPU tests
//! compare with. Inputs are already checked (ops.py, the plugins); reference.py is the specification.
#pragma once

#include "tiles.hpp"

#include <cstdint>

namespace m3ad {

constexpr int32_t kROW_CAPACITY = 48; //!< 4 x 4 pooling taps with 3 centres each

//! s_0 = 0, s_k = argmax_n min_{j<k} |p_n - p_{s_j}|^2, ties to the lowest n. Exact: a tile is skipped only
//! when its box is at least as far from the new sample as every point in it is from the samples so far. idx
//! [numSamples]; minNormSq > 0 bars points with |p|^2 <= minNormSq.
void farthestPointSample(Tiles const& tiles, float const* points, int32_t numSamples, float minNormSq,
                         int32_t* idx);

//! The groupSize nearest points of each centre by (distance, index): knnIdx [groups, groupSize] and
//! neighborhood [groups, groupSize, 3] = points[knnIdx] - points[idx].
void knnGroup(Tiles const& tiles, float const* points, int32_t const* idx, int32_t groups, int32_t groupSize,
              float* neighborhood, int32_t* knnIdx, int32_t threads);

//! The interpolation operator as sparse rows, one for each of scoredPixel [rows]. indptr [rows + 1]; indices
//! and weights have room for kROW_CAPACITY entries a row.
void interpolationOperator(float const* points, int32_t const* pointPixel, int32_t count,
                           float const* centers, int32_t groups, int32_t const* scoredPixel, int32_t rows,
                           int32_t imageSize, int32_t* indptr, int32_t* indices, float* weights,
                           int32_t threads);

//! Row r is indices and weights [indptr[r] .. indptr[r + 1] - 1].
struct SparseRows {
    int32_t const* indptr;
    int32_t const* indices;
    float const* weights;
};

//! out [rows, width] = the sparse rows times table [groups, width].
void applyRows(SparseRows const& a, int32_t rows, float const* table, int32_t width, float* out,
               int32_t threads);

//! Rows [rows, width]: the sparse rows times the table `values`, or `values` themselves where indptr is null.
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

//! decision [rows] = sum_k c_k k(v_k, x) - rho, k = v.x or, with rbf, exp(-gamma |v - x|^2).
void oneClassSvm(float const* x, int32_t rows, int32_t width, float const* supportVectors,
                 float const* coefficients, int32_t vectors, float rho, bool rbf, float gamma,
                 float* decision, int32_t threads);

} // namespace m3ad
