//! TokenInterpolate: rows = select (P x P) scatter(W) tokens, straight from tokens to rows (reference.py).
//! 1. 3-NN of each point: a warp takes 32 consecutive points and only the centres that can be near their box.
//! 2. Rows: a block merges the taps of 32 scored pixels (10 on a coarser grid) into short lists in shared
//! memory, then streams over
//!    the channels, so that neighbouring rows find their common tokens in L1 and the result is written once.

#include "kernel.cuh"
#include "nearest_three.cuh"

#include <cuda_fp16.h>
#include <type_traits>

namespace m3ad {
namespace {

// ---------------------------------------------------------------------------------------------------------
// kernels

constexpr int32_t kROW_THREADS = 128;
// On a multiprocessor; more find no shared memory where there are 100 KiB of it. Without the bound ptxas
// takes 71 registers on sm_89, and 32 with a spill on sm_90.
constexpr int32_t kROW_BLOCKS = 8;
constexpr int32_t kCHANNELS = 4; //!< a lane handles at a time

//! The merged taps of a block's rows; kSIDE: of the widest window along one axis.
template <int32_t kSIDE> struct RowLists {
    static constexpr int32_t kROWS = kSIDE == kMAX_TAPS ? 32 : 10; // of a block: 12 KiB of lists
    static constexpr int32_t kTAPS = kSIDE * kSIDE * kNEIGHBORS;   // entries of a row before merging
    int32_t index[kROWS][kTAPS];
    float weight[kROWS][kTAPS];
    int32_t count[kROWS];
};

//! A warp merges the taps of one output pixel: entries of the same centre are summed, in tap order.
template <int32_t kSIDE>
__device__ void mergeTaps(RowLists<kSIDE>& lists, int32_t slot, PixelTokens const* pixels, int32_t pixel,
                          int32_t imageSize, int32_t outputSize) {
    constexpr int32_t kTAPS = RowLists<kSIDE>::kTAPS, kROUNDS = (kTAPS + kWARP - 1) / kWARP;
    int32_t const lane = threadIdx.x % kWARP;
    PoolTaps const rows = poolTaps(pixel / outputSize, imageSize, outputSize),
                   columns = poolTaps(pixel % outputSize, imageSize, outputSize);
    int32_t* index = lists.index[slot];
    float* weight = lists.weight[slot];
    for (int32_t entry = lane; entry < kTAPS; entry += kWARP) {
        int32_t const tap = entry / kNEIGHBORS, k = entry % kNEIGHBORS, i = tap / kSIDE, j = tap % kSIDE;
        bool const inside = i < rows.count && j < columns.count;
        PixelTokens const* source =
            inside ? &pixels[(rows.first + i) * imageSize + columns.first + j] : nullptr;
        bool const used = inside && source->index[0] >= 0;
        index[entry] = used ? source->index[k] : -1;
        weight[entry] = used ? mul(mul(rows.weight(i), columns.weight(j)), source->weight[k]) : 0.0F;
    }
    __syncwarp();
    // Of entries lane, lane + 32, .. when they are the first of their centre; unrolled, they are registers.
    int32_t mergedIndex[kROUNDS];
    float mergedWeight[kROUNDS];
#pragma unroll
    for (int32_t round = 0; round < kROUNDS; ++round) {
        mergedIndex[round] = -1, mergedWeight[round] = 0.0F;
        int32_t const entry = lane + round * kWARP;
        if (entry >= kTAPS || index[entry] < 0) {
            continue;
        }
        int32_t first = 0;
        while (index[first] != index[entry]) {
            ++first;
        }
        if (first != entry) {
            continue;
        }
        mergedIndex[round] = index[entry];
        for (int32_t other = entry; other < kTAPS; ++other) {
            mergedWeight[round] =
                add(mergedWeight[round], index[other] == index[entry] ? weight[other] : 0.0F);
        }
    }
    __syncwarp();
    int32_t count = 0;
#pragma unroll
    for (int32_t round = 0; round < kROUNDS; ++round) {
        uint32_t const votes = __ballot_sync(kFULL, mergedIndex[round] >= 0);
        if (mergedIndex[round] >= 0) {
            int32_t const at = count + __popc(votes & ((1U << lane) - 1));
            index[at] = mergedIndex[round];
            weight[at] = mergedWeight[round];
        }
        count += __popc(votes);
    }
    if (lane == 0) {
        lists.count[slot] = count;
    }
}

__device__ float4 load(float const* from) {
    return *reinterpret_cast<float4 const*>(from);
}
__device__ float4 load(__half const* from) {
    auto const* pair = reinterpret_cast<__half2 const*>(from);
    float2 const low = __half22float2(pair[0]), high = __half22float2(pair[1]);
    return make_float4(low.x, low.y, high.x, high.y);
}
__device__ void store(float* to, float4 value) {
    *reinterpret_cast<float4*>(to) = value;
}
__device__ void store(__half* to, float4 value) {
    auto* pair = reinterpret_cast<__half2*>(to);
    pair[0] = __floats2half2_rn(value.x, value.y);
    pair[1] = __floats2half2_rn(value.z, value.w);
}
__device__ float toFloat(float value) {
    return value;
}
__device__ float toFloat(__half value) {
    return __half2float(value);
}
__device__ void assign(float& to, float value) {
    to = value;
}
__device__ void assign(__half& to, float value) {
    to = __float2half_rn(value);
}

//! rows [R, width], tokens [groups, width]; kALIGNED: width is a multiple of kCHANNELS
template <typename T, bool kALIGNED, int32_t kSIDE>
__global__ void __launch_bounds__(kROW_THREADS, kROW_BLOCKS)
    rowsKernel(T* rows, int32_t const* scoredPixel, int32_t rowCount, PixelTokens const* pixels,
               T const* tokens, int32_t width, int32_t imageSize, int32_t outputSize) {
    constexpr int32_t kROWS = RowLists<kSIDE>::kROWS;
    __shared__ RowLists<kSIDE> lists;
    int32_t const first = blockIdx.x * kROWS;
    int32_t const used = min(rowCount - first, kROWS);
    int32_t const warp = threadIdx.x / kWARP;
    for (int32_t slot = warp; slot < used; slot += kROW_THREADS / kWARP) {
        mergeTaps(lists, slot, pixels, scoredPixel[first + slot], imageSize, outputSize);
    }
    __syncthreads();
    int32_t constexpr kSTEP = kALIGNED ? kCHANNELS : 1;
    for (int32_t d = threadIdx.x * kSTEP; d < width; d += kROW_THREADS * kSTEP) {
        for (int32_t slot = 0; slot < used; ++slot) {
            T* out = rows + static_cast<int64_t>(first + slot) * width + d;
            float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
            for (int32_t n = 0; n < lists.count[slot]; ++n) {
                float const weight = lists.weight[slot][n];
                T const* token = tokens + static_cast<int64_t>(lists.index[slot][n]) * width + d;
                if constexpr (kALIGNED) {
                    float4 const value = load(token);
                    sum.x = fmaf(weight, value.x, sum.x);
                    sum.y = fmaf(weight, value.y, sum.y);
                    sum.z = fmaf(weight, value.z, sum.z);
                    sum.w = fmaf(weight, value.w, sum.w);
                } else {
                    sum.x = fmaf(weight, toFloat(*token), sum.x);
                }
            }
            if constexpr (kALIGNED) {
                store(out, sum);
            } else {
                assign(*out, sum.x);
            }
        }
    }
}

//! T is float or __half; kSIDE as of RowLists.
template <typename T, int32_t kSIDE>
cudaError_t launchAs(T* rows, float const* points, int32_t const* pointPixel, float const* centers,
                     T const* tokens, int32_t const* scoredPixel, int32_t count, int32_t groups,
                     int32_t width, int32_t rowCount, int32_t imageSize, int32_t outputSize, void* workspace,
                     cudaStream_t stream) {
    int32_t const numPixels = imageSize * imageSize;
    auto* pixels = static_cast<PixelTokens*>(workspace);
    cudaMemsetAsync(pixels, 0xFF, numPixels * sizeof(PixelTokens), stream); // index -1: no point

    // Candidate lists of 48 KiB at most.
    int32_t const warps = groups <= kMAX_CENTERS * kWARP / kPOINT_THREADS ? kPOINT_THREADS / kWARP : 1;
    nearestThreeKernel<<<ceilDiv(count, warps * kWARP), warps * kWARP, warps * groups * sizeof(int32_t),
                         stream>>>(pixels, points, pointPixel, centers, count, groups);
    auto const kernel = width % kCHANNELS == 0 ? rowsKernel<T, true, kSIDE> : rowsKernel<T, false, kSIDE>;
    int32_t const blocks = ceilDiv(rowCount, RowLists<kSIDE>::kROWS);
    kernel<<<blocks, kROW_THREADS, 0, stream>>>(rows, scoredPixel, rowCount, pixels, tokens, width, imageSize,
                                                outputSize);
    return cudaGetLastError();
}

} // namespace

// --------------------------------------------------------------------------------------------------------
// launcher

size_t workspaceTokenInterpolate(int32_t imageSize) {
    return static_cast<size_t>(imageSize) * imageSize * sizeof(PixelTokens);
}

cudaError_t launchTokenInterpolate(void* rows, float const* points, int32_t const* pointPixel,
                                   float const* centers, void const* tokens, int32_t const* scoredPixel,
                                   int32_t count, int32_t groups, int32_t width, int32_t rowCount,
                                   bool isHalf, int32_t imageSize, int32_t outputSize, void* workspace,
                                   cudaStream_t stream) {
    auto const launch = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        auto const onGrid = outputSize == imageSize ? launchAs<T, kMAX_TAPS> : launchAs<T, kMAX_WIDE_TAPS>;
        return onGrid(static_cast<T*>(rows), points, pointPixel, centers, static_cast<T const*>(tokens),
                      scoredPixel, count, groups, width, rowCount, imageSize, outputSize, workspace, stream);
    };
    return isHalf ? launch(static_cast<__half*>(nullptr)) : launch(static_cast<float*>(nullptr));
}

} // namespace m3ad
