//! What the kernels share about warps and grids.
#pragma once

#include <cstdint>

namespace m3ad {

constexpr int32_t kWARP = 32;
constexpr uint32_t kFULL = 0xFFFFFFFFU; //!< every lane takes part

inline int32_t ceilDiv(int32_t a, int32_t b) {
    return (a + b - 1) / b;
}

__device__ inline float warpMin(float value) {
    for (int32_t offset = kWARP / 2; offset > 0; offset /= 2) {
        value = fminf(value, __shfl_xor_sync(kFULL, value, offset));
    }
    return value;
}

__device__ inline float warpMax(float value) {
    return -warpMin(-value);
}

} // namespace m3ad
