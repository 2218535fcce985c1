#include "kernel.hpp"

#include "../common/arithmetic.hpp"
#include "../common/c_api.hpp"
#include "../common/parallel.hpp"

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

//! |a|^2 and |b|^2 of `width` values, added to the sums.
M3AD_HOST_DEVICE void addSquares(float const* a, float const* b, int32_t width, float& ofA, float& ofB) {
    Lanes aa = {}, bb = {};
    int32_t d = 0;
    for (; d + kLANES <= width; d += kLANES) {
        aa += lanes(a + d) * lanes(a + d);
        bb += lanes(b + d) * lanes(b + d);
    }
    ofA += total(aa);
    ofB += total(bb);
    for (; d < width; ++d) {
        ofA += a[d] * a[d];
        ofB += b[d] * b[d];
    }
}

//! |a ofA - b ofB|^2 of `width` values.
M3AD_HOST_DEVICE float squaredDifference(float const* a, float ofA, float const* b, float ofB,
                                         int32_t width) {
    Lanes dd = {};
    float tail = 0;
    int32_t d = 0;
    for (; d + kLANES <= width; d += kLANES) {
        Lanes const difference = lanes(a + d) * ofA - lanes(b + d) * ofB;
        dd += difference * difference;
    }
    for (; d < width; ++d) {
        float const difference = a[d] * ofA - b[d] * ofB;
        tail += difference * difference;
    }
    return total(dd) + tail;
}

//! features [end - begin, width] and rows begin .. end - 1 of reconstructed -> scores begin .. end - 1.
M3AD_CLONES void scoreRows(float const* features, Blocks const& reconstructed, int32_t begin, int32_t end,
                           float* scores) {
    for (int32_t row = begin; row < end; ++row) {
        float const* const feature = features + int64_t{row - begin} * reconstructed.width;
        float ofA = 0, ofB = 0, score = 0;
        float const* a = feature;
        for (int32_t n = 0; n < reconstructed.count; ++n) {
            int32_t const width = reconstructed.widths[n];
            addSquares(a, reconstructed.values[n] + int64_t{row} * width, width, ofA, ofB);
            a += width;
        }
        ofA = 1 / larger(std::sqrt(ofA), kMIN_NORM);
        ofB = 1 / larger(std::sqrt(ofB), kMIN_NORM);
        a = feature;
        for (int32_t n = 0; n < reconstructed.count; ++n) {
            int32_t const width = reconstructed.widths[n];
            score += squaredDifference(a, ofA, reconstructed.values[n] + int64_t{row} * width, ofB, width);
            a += width;
        }
        scores[row] = score / 2;
    }
}

//! The same for features that are sparse rows times a tokens, formed a few at a time and never stored.
void scoreSparseRows(SparseRows a, float const* tokens, Blocks const& reconstructed, int32_t begin,
                     int32_t end, float* scores) {
    int32_t const width = reconstructed.width;
    std::vector<float> features(static_cast<size_t>(kSCORED) * width);
    for (int32_t row = begin; row < end; row += kSCORED) {
        int32_t const count = std::min(kSCORED, end - row);
        applyRange({a.indptr + row, a.indices, a.weights}, 0, count, tokens, width, features.data());
        scoreRows(features.data(), reconstructed, row, row + count, scores);
    }
}

} // namespace

void applyRows(SparseRows const& a, int32_t rows, float const* tokens, int32_t width, float* out,
               int32_t threads) {
    parallelFor(rows, threads,
                [&](int32_t begin, int32_t end, int32_t) { applyRange(a, begin, end, tokens, width, out); });
}

void cosineScores(Features const* features, Blocks const* reconstructed, int32_t pairs, int32_t rows,
                  float* scores, int32_t threads) {
    parallelFor(rows, threads, [&](int32_t begin, int32_t end, int32_t) {
        for (int32_t p = 0; p < pairs; ++p) {
            Features const& f = features[p];
            Blocks const& again = reconstructed[p];
            float* const found = scores + int64_t{p} * rows;
            if (f.rows.indptr != nullptr) {
                scoreSparseRows(f.rows, f.values, again, begin, end, found);
            } else {
                scoreRows(f.values + int64_t{begin} * again.width, again, begin, end, found);
            }
        }
    });
}

} // namespace m3ad

M3AD_API m3ad_apply_rows(int32_t const* indptr, int32_t const* indices, float const* weights, int32_t rows,
                         float const* tokens, int32_t width, float* out, int32_t threads) {
    return m3ad::guarded(
        [&] { m3ad::applyRows({indptr, indices, weights}, rows, tokens, width, out, threads); });
}

//! features: per pair indptr, indices and weights of the sparse rows (null without) and the values.
M3AD_API m3ad_cosine_scores(m3ad::Features const* features, m3ad::Blocks const* reconstructed, int32_t pairs,
                            int32_t rows, float* scores, int32_t threads) {
    return m3ad::guarded([&] { m3ad::cosineScores(features, reconstructed, pairs, rows, scores, threads); });
}
