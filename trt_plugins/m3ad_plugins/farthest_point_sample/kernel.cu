//! FarthestPointSample: s_0 = 0, s_k = argmax_n min_{j<k} |p_n - p_{s_j}|^2, ties to the lowest n
//! (reference.py). One block per cloud; thread t owns tile t. Each step tests all boxes at once, touches the
//! few tiles the new sample can lower, and reduces the tiles' farthest points: three barriers, whatever N is.

#include "../common/tiles.cuh"
#include "kernel.cuh"

#include <climits>

namespace m3ad {
namespace {

// ----------------------------------------------------------------------------------------------------------
// kernel

//! The farthest point of a set: its distance as bits (they order as the floats do, and -1 lies below) and
//! index.
struct Farthest {
    int32_t bits;
    int32_t index;
};

__device__ Farthest warpFarthest(Farthest mine) {
#if __CUDA_ARCH__ >= 800
    int32_t const most = __reduce_max_sync(kFULL, mine.bits);
    return {most, __reduce_min_sync(kFULL, mine.bits == most ? mine.index : INT_MAX)};
#else
    for (int32_t offset = kWARP / 2; offset > 0; offset /= 2) {
        Farthest const other{__shfl_xor_sync(kFULL, mine.bits, offset),
                             __shfl_xor_sync(kFULL, mine.index, offset)};
        bool const better = other.bits > mine.bits || (other.bits == mine.bits && other.index < mine.index);
        mine = better ? other : mine;
    }
    return mine;
#endif
}

struct SampleShared {
    int32_t touchedCount;
    int32_t touched[kTHREADS];
    Farthest tile[kTHREADS];
    Farthest warp[kWARP];
};

union FpsShared {
    BuildShared build;
    SampleShared sample;
};

//! A warp lowers the running distances of tile t by the sample p; with `start`, it sets them first.
__device__ Farthest updateTile(TileView tiles, int32_t t, int32_t size, int32_t count, float px, float py,
                               float pz, bool start, float minNormSq) {
    Farthest best{__float_as_int(-1.0F), INT_MAX};
    for (int32_t i = t * size + static_cast<int32_t>(threadIdx.x) % kWARP; i < min((t + 1) * size, count);
         i += kWARP) {
        float const x = tiles.x[i], y = tiles.y[i], z = tiles.z[i];
        float closest = __int_as_float(0x7F800000); // infinity
        if (!start) {
            closest = tiles.closest[i];
        } else if (minNormSq > 0 && normSq(x, y, z) <= minNormSq) {
            closest = -1.0F; // barred
        }
        float const distance = distanceSq(x, y, z, px, py, pz);
        closest = distance < closest ? distance : closest;
        tiles.closest[i] = closest;
        int32_t const bits = __float_as_int(closest), index = tiles.index[i];
        if (bits > best.bits || (bits == best.bits && index < best.index)) {
            best = {bits, index};
        }
    }
    return warpFarthest(best);
}

//! idx [numSamples], points [count, 3]
__global__ void __launch_bounds__(kTHREADS)
    farthestPointSampleKernel(int32_t* idx, float const* points, int32_t count, int32_t numSamples,
                              float minNormSq, void* workspace) {
    __shared__ FpsShared memory;
    TileView const tiles(workspace, count);
    buildTiles(points, count, tiles, memory.build);
    SampleShared& shared = memory.sample; // buildTiles ended with a barrier: its memory is free

    int32_t const thread = threadIdx.x, lane = thread % kWARP, warp = thread / kWARP,
                  warps = kTHREADS / kWARP;
    int32_t const size = tileSize(count), numTiles = tileCount(count);
    bool const owner = thread < numTiles;
    Box const box = owner ? tiles.box[thread] : Box{};
    Farthest const none{__float_as_int(-1.0F), INT_MAX};
    int32_t sample = 0;
    if (thread == 0) {
        idx[0] = 0;
    }
    for (int32_t k = 1; k < numSamples; ++k) {
        float const px = points[3 * sample], py = points[3 * sample + 1], pz = points[3 * sample + 2];
        bool const start = k == 1;
        if (thread == 0) {
            shared.touchedCount = 0;
        }
        __syncthreads();
        // The order of the list is left to chance; nothing depends on it.
        if (owner && (start || box.distanceSq(px, py, pz) < __int_as_float(shared.tile[thread].bits))) {
            shared.touched[atomicAdd(&shared.touchedCount, 1)] = thread;
        }
        __syncthreads();
        for (int32_t n = warp; n < shared.touchedCount; n += warps) {
            int32_t const t = shared.touched[n];
            Farthest const best = updateTile(tiles, t, size, count, px, py, pz, start, minNormSq);
            if (lane == 0) {
                shared.tile[t] = best;
            }
        }
        __syncthreads();
        Farthest const ofWarp = warpFarthest(owner ? shared.tile[thread] : none);
        if (lane == 0) {
            shared.warp[warp] = ofWarp;
        }
        __syncthreads();
        Farthest const farthest = warpFarthest(shared.warp[lane]);
        // Nothing may be picked: the first point again, as an argmax over equal values has it.
        sample = farthest.bits == none.bits ? 0 : farthest.index;
        if (thread == 0) {
            idx[k] = sample;
        }
    }
}

} // namespace

// --------------------------------------------------------------------------------------------------------
// launcher

size_t workspaceFarthestPointSample(int32_t count) {
    return TileView::bytes(count);
}

cudaError_t launchFarthestPointSample(int32_t* idx, float const* points, int32_t const* /*pointPixel*/,
                                      int32_t count, int32_t numSamples, float minNormSq, void* workspace,
                                      cudaStream_t stream) {
    farthestPointSampleKernel<<<1, kTHREADS, 0, stream>>>(idx, points, count, numSamples, minNormSq,
                                                          workspace);
    return cudaGetLastError();
}

} // namespace m3ad
