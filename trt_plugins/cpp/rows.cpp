#include "ops.hpp"

#include "../common/arithmetic.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace m3ad {
namespace {

//! Sixteen floats: one register of AVX-512, two of AVX2; loaded from anywhere.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int32_t kLANES = 16;
//! Lanes a pass: the sums stay in registers, a tile's tokens in the first cache.
constexpr int32_t kBLOCK = 4;
//! Features of so many rows stay in the second cache until they are compared.
constexpr int32_t kSCORED = 16;
constexpr float kMIN_NORM = 1e-12F;

M3AD_HOST_DEVICE Lanes const& lanes(float const* values) {
    return *reinterpret_cast<Lanes const*>(values);
}

M3AD_HOST_DEVICE Lanes& lanes(float* values) {
    return *reinterpret_cast<Lanes*>(values);
}

//! Columns from .. from + 16 Vectors - 1 of out, terms added in the rows' order.
template <int32_t Vectors>
M3AD_HOST_DEVICE void applyColumns(SparseRows const& a, int32_t begin, int32_t end, float const* tokens,
                                   int32_t width, int32_t from, float* out) {
    for (int32_t row = begin; row < end; ++row) {
        Lanes sum[Vectors] = {};
        for (int32_t n = a.indptr[row]; n < a.indptr[row + 1]; ++n) {
            float const* token = tokens + int64_t{a.indices[n]} * width + from;
            for (int32_t v = 0; v < Vectors; ++v) {
                sum[v] += a.weights[n] * lanes(token + v * kLANES);
            }
        }
        for (int32_t v = 0; v < Vectors; ++v) {
            lanes(out + int64_t{row} * width + from + v * kLANES) = sum[v];
        }
    }
}

M3AD_CLONES void applyRange(SparseRows const& a, int32_t begin, int32_t end, float const* tokens,
                            int32_t width, float* out) {
    int32_t from = 0;
    for (; from + kBLOCK * kLANES <= width; from += kBLOCK * kLANES) {
        applyColumns<kBLOCK>(a, begin, end, tokens, width, from, out);
    }
    for (; from + kLANES <= width; from += kLANES) {
        applyColumns<1>(a, begin, end, tokens, width, from, out);
    }
    for (int32_t row = begin; row < end; ++row) {
        for (int32_t d = from; d < width; ++d) {
            float sum = 0;
            for (int32_t n = a.indptr[row]; n < a.indptr[row + 1]; ++n) {
                sum = add(sum, mul(a.weights[n], tokens[int64_t{a.indices[n]} * width + d]));
            }
            out[int64_t{row} * width + d] = sum;
        }
    }
}

M3AD_HOST_DEVICE float total(Lanes const& sum) {
    float result = 0;
    for (int32_t lane = 0; lane < kLANES; ++lane) {
        result += sum[lane];
    }
    return result;
}

//! feature and reconstructed [rows, width] -> scores [rows].
M3AD_CLONES void scoreRows(float const* feature, float const* reconstructed, int32_t rows, int32_t width,
                           float* scores) {
    int32_t const whole = width / kLANES * kLANES;
    for (int32_t row = 0; row < rows; ++row) {
        float const* a = feature + int64_t{row} * width;
        float const* b = reconstructed + int64_t{row} * width;
        Lanes aa = {}, bb = {}, dd = {};
        float tailA = 0, tailB = 0, tail = 0;
        for (int32_t d = 0; d < whole; d += kLANES) {
            aa += lanes(a + d) * lanes(a + d);
            bb += lanes(b + d) * lanes(b + d);
        }
        for (int32_t d = whole; d < width; ++d) {
            tailA += a[d] * a[d];
            tailB += b[d] * b[d];
        }
        float const ofA = 1 / larger(std::sqrt(total(aa) + tailA), kMIN_NORM);
        float const ofB = 1 / larger(std::sqrt(total(bb) + tailB), kMIN_NORM);
        for (int32_t d = 0; d < whole; d += kLANES) {
            Lanes const difference = lanes(a + d) * ofA - lanes(b + d) * ofB;
            dd += difference * difference;
        }
        for (int32_t d = whole; d < width; ++d) {
            float const difference = a[d] * ofA - b[d] * ofB;
            tail += difference * difference;
        }
        scores[row] = (total(dd) + tail) / 2;
    }
}

//! The same for features that are sparse rows times a table, formed a few at a time and never stored.
void scoreSparseRows(SparseRows a, float const* table, float const* reconstructed, int32_t begin, int32_t end,
                     int32_t width, float* scores) {
    std::vector<float> features(static_cast<size_t>(kSCORED) * width);
    for (int32_t row = begin; row < end; row += kSCORED) {
        int32_t const count = std::min(kSCORED, end - row);
        applyRange({a.indptr + row, a.indices, a.weights}, 0, count, table, width, features.data());
        scoreRows(features.data(), reconstructed + int64_t{row} * width, count, width, scores + row);
    }
}

} // namespace

void applyRows(SparseRows const& a, int32_t rows, float const* const* tables, int32_t const* widths,
               float* const* out, int32_t count, int32_t threads) {
    parallelFor(rows, threads, [&](int32_t begin, int32_t end, int32_t) {
        for (int32_t t = 0; t < count; ++t) {
            applyRange(a, begin, end, tables[t], widths[t], out[t]);
        }
    });
}

void cosineScores(Features const* features, float const* const* reconstructed, int32_t const* widths,
                  int32_t pairs, int32_t rows, float* scores, int32_t threads) {
    parallelFor(rows, threads, [&](int32_t begin, int32_t end, int32_t) {
        for (int32_t p = 0; p < pairs; ++p) {
            Features const& f = features[p];
            float* const found = scores + int64_t{p} * rows;
            int64_t const from = int64_t{begin} * widths[p];
            if (f.rows.indptr != nullptr) {
                scoreSparseRows(f.rows, f.values, reconstructed[p], begin, end, widths[p], found);
            } else {
                scoreRows(f.values + from, reconstructed[p] + from, end - begin, widths[p], found + begin);
            }
        }
    });
}

} // namespace m3ad
