//! NearestRow: min_b |x_q - b| and the lowest row that has it (reference.py).
//! The first kernel finds the least distance of each query and block of rows, in fp32 from direct
//! differences, whose error has a relative bound. The second measures again, in fp64, every row that this
//! bound leaves.

#include "../common/warp.cuh"
#include "kernel.cuh"

namespace m3ad {
namespace {

// ---------------------------------------------------------------------------------------------------------
// kernels

constexpr int32_t kTHREADS = 256;
constexpr int32_t kSIDE = 64;  //!< queries and rows of a block
constexpr int32_t kDEPTH = 16; //!< of their columns that lie in shared memory at a time
constexpr int32_t kOWN = 4;    //!< queries and rows of a thread
constexpr int32_t kACROSS = kSIDE / kOWN;

//! minima [queries, blocks of rows] of |x - b|^2
__global__ void __launch_bounds__(kTHREADS)
    blockMinimaKernel(float* minima, float const* x, float const* bank, int32_t queries, int32_t width,
                      int32_t rows, int32_t rowBlocks) {
    __shared__ float sharedX[kDEPTH][kSIDE + 1];
    __shared__ float sharedRows[kDEPTH][kSIDE + 1];
    int32_t const firstQuery = blockIdx.x / rowBlocks * kSIDE, rowBlock = blockIdx.x % rowBlocks;
    int32_t const firstRow = rowBlock * kSIDE;
    int32_t const across = threadIdx.x % kACROSS, down = threadIdx.x / kACROSS;
    float sum[kOWN][kOWN] = {};
    for (int32_t start = 0; start < width; start += kDEPTH) {
        for (int32_t n = threadIdx.x; n < kDEPTH * kSIDE; n += kTHREADS) {
            int32_t const d = n % kDEPTH, place = n / kDEPTH;
            int32_t const query = min(firstQuery + place, queries - 1), row = min(firstRow + place, rows - 1);
            bool const inside = start + d < width;
            sharedX[d][place] = inside ? x[static_cast<int64_t>(query) * width + start + d] : 0.0F;
            sharedRows[d][place] = inside ? bank[static_cast<int64_t>(row) * width + start + d] : 0.0F;
        }
        __syncthreads();
        for (int32_t d = 0; d < kDEPTH; ++d) {
            float own[kOWN];
#pragma unroll
            for (int32_t r = 0; r < kOWN; ++r) {
                own[r] = sharedRows[d][across + r * kACROSS];
            }
#pragma unroll
            for (int32_t q = 0; q < kOWN; ++q) {
                float const value = sharedX[d][down + q * kACROSS];
#pragma unroll
                for (int32_t r = 0; r < kOWN; ++r) {
                    float const difference = value - own[r];
                    sum[q][r] = fmaf(difference, difference, sum[q][r]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int32_t q = 0; q < kOWN; ++q) {
        // rows past the last are the last one again
        float least = fminf(fminf(sum[q][0], sum[q][1]), fminf(sum[q][2], sum[q][3]));
        for (int32_t offset = kACROSS / 2; offset > 0; offset /= 2) {
            least = fminf(least, __shfl_xor_sync(kFULL, least, offset));
        }
        int32_t const query = firstQuery + down + q * kACROSS;
        if (across == 0 && query < queries) {
            minima[static_cast<int64_t>(query) * rowBlocks + rowBlock] = least;
        }
    }
}

//! distance [queries], idx [queries]; one warp a query
__global__ void __launch_bounds__(kTHREADS)
    nearestKernel(float* distance, int32_t* idx, float const* x, float const* bank, float const* minima,
                  int32_t queries, int32_t width, int32_t rows, int32_t rowBlocks, float slack) {
    int32_t const query = (blockIdx.x * kTHREADS + threadIdx.x) / kWARP, lane = threadIdx.x % kWARP;
    if (query >= queries) {
        return; // guard
    }
    float const* own = x + static_cast<int64_t>(query) * width;
    float const* least = minima + static_cast<int64_t>(query) * rowBlocks;
    float limit = least[0];
    for (int32_t block = lane; block < rowBlocks; block += kWARP) {
        limit = fminf(limit, least[block]);
    }
    limit = warpMin(limit);
    limit = fmaf(limit, slack, limit) + 1e-30F; // the latter for squares too small for fp32
    double nearest = 0.0;
    int32_t found = -1;
    for (int32_t block = 0; block < rowBlocks; ++block) {
        if (least[block] > limit) {
            continue;
        }
        for (int32_t row = block * kSIDE; row < min((block + 1) * kSIDE, rows); ++row) {
            float const* other = bank + static_cast<int64_t>(row) * width;
            float rough = 0.0F;
            for (int32_t d = lane; d < width; d += kWARP) {
                float const difference = own[d] - other[d];
                rough = fmaf(difference, difference, rough);
            }
            for (int32_t offset = kWARP / 2; offset > 0; offset /= 2) {
                rough += __shfl_xor_sync(kFULL, rough, offset);
            }
            if (rough > limit) {
                continue;
            }
            double sum = 0.0;
            for (int32_t d = lane; d < width; d += kWARP) {
                double const difference = static_cast<double>(own[d]) - static_cast<double>(other[d]);
                sum = fma(difference, difference, sum);
            }
            for (int32_t offset = kWARP / 2; offset > 0; offset /= 2) {
                sum += __shfl_xor_sync(kFULL, sum, offset);
            }
            if (found < 0 || sum < nearest) { // rows come in order: of equals the lowest stays
                nearest = sum;
                found = row;
            }
        }
    }
    if (lane == 0) {
        distance[query] = static_cast<float>(sqrt(nearest));
        idx[query] = found;
    }
}

} // namespace

// --------------------------------------------------------------------------------------------------------
// launcher

int32_t blockMinima(int32_t queries, int32_t rows) {
    return queries * ceilDiv(rows, kSIDE);
}

size_t workspaceNearestRow(int32_t minima) {
    return minima * sizeof(float);
}

cudaError_t launchNearestRow(float* distance, int32_t* idx, float const* x, float const* bank,
                             int32_t queries, int32_t width, int32_t rows, void* workspace,
                             cudaStream_t stream) {
    if (queries == 0) {
        return cudaSuccess;
    }
    auto* minima = static_cast<float*>(workspace);
    int32_t const rowBlocks = ceilDiv(rows, kSIDE);
    int32_t const blocks = ceilDiv(queries, kSIDE) * rowBlocks;
    blockMinimaKernel<<<blocks, kTHREADS, 0, stream>>>(minima, x, bank, queries, width, rows, rowBlocks);
    // A sum of `width` squares is off by width + 2 roundings of 2^-24 at most, the least one and the row's
    // alike.
    float const slack = static_cast<float>(width + 16) * 0x1p-22F;
    nearestKernel<<<ceilDiv(queries, kTHREADS / kWARP), kTHREADS, 0, stream>>>(
        distance, idx, x, bank, minima, queries, width, rows, rowBlocks, slack);
    return cudaGetLastError();
}

} // namespace m3ad
