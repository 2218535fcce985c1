#include "kernel.hpp"

#include "../common/arithmetic.hpp"
#include "../common/c_api.hpp"
#include "../common/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace m3ad {
namespace {

constexpr int32_t kROWS = 64; //!< rows per step, one per lane

//! exp(x) for x <= 0 to about 1e-7 of its value: 2^n times a polynomial of the rest, n = round(x / ln 2).
M3AD_HOST_DEVICE float expNegative(float x) {
    x = larger(x, -87.0F);
    float const n = static_cast<float>(static_cast<int32_t>(x * 1.44269504F - 0.5F));
    float const r = (x - n * 0.693359375F) + n * 2.12194440e-4F; // ln 2 in two parts
    float sum = 1.0F / 5040;
    sum = sum * r + 1.0F / 720;
    sum = sum * r + 1.0F / 120;
    sum = sum * r + 1.0F / 24;
    sum = sum * r + 1.0F / 6;
    sum = sum * r + 0.5F;
    sum = sum * r + 1.0F;
    sum = sum * r + 1.0F;
    union {
        int32_t bits;
        float value;
    } power{(static_cast<int32_t>(n) + 127) << 23};
    return sum * power.value;
}

//! Decisions of up to kROWS rows; `lanes` holds them as [width, kROWS].
M3AD_CLONES void rbfRows(float const* lanes, int32_t width, float const* supportVectors,
                         float const* coefficients, int32_t vectors, float gamma, double* __restrict sum) {
    for (int32_t k = 0; k < vectors; ++k) {
        float distance[kROWS] = {};
        for (int32_t d = 0; d < width; ++d) {
            float const v = supportVectors[int64_t{k} * width + d];
            for (int32_t lane = 0; lane < kROWS; ++lane) {
                float const difference = lanes[d * kROWS + lane] - v;
                distance[lane] += difference * difference;
            }
        }
        for (int32_t lane = 0; lane < kROWS; ++lane) {
            sum[lane] += coefficients[k] * expNegative(-gamma * distance[lane]);
        }
    }
}

} // namespace

void oneClassSvm(float const* x, int32_t rows, int32_t width, float const* supportVectors,
                 float const* coefficients, int32_t vectors, float rho, bool rbf, float gamma,
                 float* decision, int32_t threads) {
    std::vector<double> normal(width); // linear: sum_k c_k v_k
    for (int32_t k = 0; k < (rbf ? 0 : vectors); ++k) {
        for (int32_t d = 0; d < width; ++d) {
            normal[d] += static_cast<double>(coefficients[k]) * supportVectors[int64_t{k} * width + d];
        }
    }
    parallelFor((rows + kROWS - 1) / kROWS, threads, [&](int32_t begin, int32_t end, int32_t) {
        std::vector<float> lanes(static_cast<size_t>(width) * kROWS);
        for (int32_t start = begin * kROWS; start < std::min(end * kROWS, rows); start += kROWS) {
            int32_t const count = std::min(kROWS, rows - start);
            double sum[kROWS] = {};
            for (int32_t lane = 0; lane < count; ++lane) {
                float const* row = x + int64_t{start + lane} * width;
                for (int32_t d = 0; d < width; ++d) {
                    lanes[d * kROWS + lane] = row[d];
                    sum[lane] += row[d] * normal[d];
                }
            }
            if (rbf) {
                rbfRows(lanes.data(), width, supportVectors, coefficients, vectors, gamma, sum);
            }
            for (int32_t lane = 0; lane < count; ++lane) {
                decision[start + lane] = static_cast<float>(sum[lane] - rho);
            }
        }
    });
}

} // namespace m3ad

M3AD_API m3ad_one_class_svm(float const* x, int32_t rows, int32_t width, float const* supportVectors,
                            float const* coefficients, int32_t vectors, float rho, int32_t rbf, float gamma,
                            float* decision, int32_t threads) {
    return m3ad::guarded([&] {
        m3ad::oneClassSvm(x, rows, width, supportVectors, coefficients, vectors, rho, rbf != 0, gamma,
                          decision, threads);
    });
}
