//! The arithmetic of the ops, one definition for CPU and GPU: every step rounded to fp32, nothing fused.
//! On the GPU the intrinsics forbid contraction; on the CPU -ffp-contract=off does. The ops' reference.py
//! are the specification.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define M3AD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define M3AD_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace m3ad {

#ifdef __CUDA_ARCH__
M3AD_HOST_DEVICE float add(float a, float b) {
    return __fadd_rn(a, b);
}
M3AD_HOST_DEVICE float sub(float a, float b) {
    return __fsub_rn(a, b);
}
M3AD_HOST_DEVICE float mul(float a, float b) {
    return __fmul_rn(a, b);
}
M3AD_HOST_DEVICE float quotient(float a, float b) {
    return __fdiv_rn(a, b);
}
#else
M3AD_HOST_DEVICE float add(float a, float b) {
    return a + b;
}
M3AD_HOST_DEVICE float sub(float a, float b) {
    return a - b;
}
M3AD_HOST_DEVICE float mul(float a, float b) {
    return a * b;
}
M3AD_HOST_DEVICE float quotient(float a, float b) {
    return a / b;
}
#endif

M3AD_HOST_DEVICE float larger(float a, float b) {
    return a > b ? a : b;
}

M3AD_HOST_DEVICE float normSq(float x, float y, float z) {
    return add(add(mul(x, x), mul(y, y)), mul(z, z));
}

//! |a - b|^2 as (dx*dx + dy*dy) + dz*dz.
M3AD_HOST_DEVICE float distanceSq(float ax, float ay, float az, float bx, float by, float bz) {
    return normSq(sub(ax, bx), sub(ay, by), sub(az, bz));
}

//! From a point to the interval [lo, hi]: at most the rounded distance to any point of it (rounding is
//! monotone), so a box distance built from three of these never exceeds distanceSq of a point in the box.
M3AD_HOST_DEVICE float gap(float p, float lo, float hi) {
    return larger(larger(sub(lo, p), sub(p, hi)), 0.0F);
}

//! From a point to the farther end of [lo, hi]: at least the rounded distance to any point of it.
M3AD_HOST_DEVICE float reach(float p, float lo, float hi) {
    return larger(sub(hi, p), sub(p, lo));
}

constexpr int32_t kNEIGHBORS = 3;
constexpr float kDISTANCE_EPS = 1e-8F;

//! Turns three squared distances into the weights v_k / (v_0 + v_1 + v_2), v_k = 1 / (d_k + eps).
M3AD_HOST_DEVICE void interpolationWeights(float const distance[kNEIGHBORS], float weight[kNEIGHBORS]) {
    for (int32_t k = 0; k < kNEIGHBORS; ++k) {
        weight[k] = quotient(1.0F, add(distance[k], kDISTANCE_EPS));
    }
    float const total = add(add(weight[0], weight[1]), weight[2]);
    for (int32_t k = 0; k < kNEIGHBORS; ++k) {
        weight[k] = quotient(weight[k], total);
    }
}

M3AD_HOST_DEVICE int32_t lesser(int32_t a, int32_t b) {
    return a < b ? a : b;
}

//! One output row of the pooling P = AdaptiveAvgPool(output) AvgPool(3, stride 1): inputs first .. first +
//! count - 1. A window of n averages has n + 2 taps, each weighed by how many of them it is in: (1,1,1)/3,
//! (1,2,2,1)/6, .. (1,2,3,3,3,2,1)/15.
struct PoolTaps {
    int32_t first;
    int32_t count;
    M3AD_HOST_DEVICE float weight(int32_t tap) const {
        int32_t const averages = count - 2;
        int32_t const holds = lesser(lesser(tap + 1, count - tap), lesser(averages, 3));
        return quotient(static_cast<float>(holds), static_cast<float>(3 * averages));
    }
};

constexpr int32_t kMAX_TAPS = 4;      //!< on the image's own grid: windows of one or two averages
constexpr int32_t kMAX_WIDE_TAPS = 7; //!< on a coarser one, of at least a quarter of its side

M3AD_HOST_DEVICE PoolTaps poolTaps(int32_t out, int32_t size, int32_t output) {
    int32_t const inner = size - 2;
    int32_t const start = out * inner / output;
    int32_t const stop = ((out + 1) * inner + output - 1) / output;
    return {start, stop - start + 2};
}

} // namespace m3ad
