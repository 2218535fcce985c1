//! The first step of token interpolation: the 3 nearest centres of each point and their weights, per pixel.
#pragma once

#include "../common/arithmetic.hpp"
#include "../common/warp.cuh"

#include <cfloat>
#include <cstdint>

namespace m3ad {

constexpr int32_t kPOINT_THREADS = 128; //!< at most, where the warps' lists fit in shared memory

//! The 3 nearest centres of a pixel and their weights; index[0] < 0 marks a pixel without a point.
struct PixelTokens {
    int32_t index[kNEIGHBORS];
    float weight[kNEIGHBORS];
};

//! The third smallest of the lanes' values, equal ones counted apart.
__device__ inline float thirdSmallest(float value) {
    float smallest = FLT_MAX;
    for (int32_t k = 0; k < kNEIGHBORS; ++k) {
        smallest = warpMin(value);
        uint32_t const holders = __ballot_sync(kFULL, value == smallest);
        if (static_cast<int32_t>(threadIdx.x) % kWARP == __ffs(holders) - 1) {
            value = __int_as_float(0x7F800000); // infinity
        }
    }
    return smallest;
}

//! pixels [imageSize^2], points [count, 3], pointPixel [count], centers [groups, 3]; shared [warps, groups]
static __global__ void __launch_bounds__(kPOINT_THREADS)
    nearestThreeKernel(PixelTokens* pixels, float const* points, int32_t const* pointPixel,
                       float const* centers, int32_t count, int32_t groups) {
    extern __shared__ int32_t lists[];
    int32_t const lane = threadIdx.x % kWARP, warp = threadIdx.x / kWARP;
    int32_t const first = (blockIdx.x * (blockDim.x / kWARP) + warp) * kWARP;
    if (first >= count) {
        return; // guard: whole warps only
    }
    int32_t* candidates = lists + warp * groups;
    int32_t const i = min(first + lane, count - 1); // a short last warp repeats its last point
    float const x = points[3 * i], y = points[3 * i + 1], z = points[3 * i + 2];
    float const loX = warpMin(x), hiX = warpMax(x), loY = warpMin(y), hiY = warpMax(y);
    float const loZ = warpMin(z), hiZ = warpMax(z);

    // Three different centres lie within the third smallest of the lanes' least reaches, so the third nearest
    // does.
    float least = __int_as_float(0x7F800000); // infinity
    for (int32_t g = lane; g < groups; g += kWARP) {
        float const most = normSq(reach(centers[3 * g], loX, hiX), reach(centers[3 * g + 1], loY, hiY),
                                  reach(centers[3 * g + 2], loZ, hiZ));
        least = fminf(least, most);
    }
    float const bound = thirdSmallest(least);
    int32_t candidateCount = 0;
    for (int32_t start = 0; start < groups; start += kWARP) {
        int32_t const g = start + lane;
        bool const near =
            g < groups && normSq(gap(centers[3 * g], loX, hiX), gap(centers[3 * g + 1], loY, hiY),
                                 gap(centers[3 * g + 2], loZ, hiZ)) <= bound;
        uint32_t const votes = __ballot_sync(kFULL, near);
        if (near) {
            candidates[candidateCount + __popc(votes & ((1U << lane) - 1))] = g; // ascending
        }
        candidateCount += __popc(votes);
    }
    __syncwarp();

    float distance[kNEIGHBORS] = {__int_as_float(0x7F800000), __int_as_float(0x7F800000),
                                  __int_as_float(0x7F800000)};
    int32_t index[kNEIGHBORS] = {0, 0, 0};
    for (int32_t n = 0; n < candidateCount; ++n) {
        int32_t const g = candidates[n];
        float const d = distanceSq(x, y, z, centers[3 * g], centers[3 * g + 1], centers[3 * g + 2]);
        // Strictly nearer only: centres come in ascending order, so a tie leaves the lower index.
        if (d < distance[0]) {
            distance[2] = distance[1], index[2] = index[1];
            distance[1] = distance[0], index[1] = index[0];
            distance[0] = d, index[0] = g;
        } else if (d < distance[1]) {
            distance[2] = distance[1], index[2] = index[1];
            distance[1] = d, index[1] = g;
        } else if (d < distance[2]) {
            distance[2] = d, index[2] = g;
        }
    }
    PixelTokens found;
    interpolationWeights(distance, found.weight);
    for (int32_t k = 0; k < kNEIGHBORS; ++k) {
        found.index[k] = index[k];
    }
    if (first + lane < count) {
        pixels[pointPixel[i]] = found;
    }
}

} // namespace m3ad
