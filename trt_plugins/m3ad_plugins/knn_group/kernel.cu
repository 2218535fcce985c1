//! KnnGroup: the S points nearest to each centre by (distance, index), minus the centre (reference.py).
//! One warp per centre visits tiles nearest box first, and stops when the next box is farther than the S-th
//! point. Kept points are 64-bit keys, distance bits over index, so that one comparison orders both.

#include "../common/tiles.cuh"
#include "../farthest_point_sample/kernel.cuh"
#include "kernel.cuh"

namespace m3ad {
namespace {

// ----------------------------------------------------------------------------------------------------------
// kernel

__global__ void __launch_bounds__(kTHREADS)
    buildTilesKernel(float const* points, int32_t count, void* workspace) {
    __shared__ BuildShared shared;
    buildTiles(points, count, TileView(workspace, count), shared);
}

//! A warp sorts keys [length], a power of two, in ascending order (bitonic).
__device__ void sortKeys(unsigned long long* keys, int32_t length) {
    for (int32_t width = 2; width <= length; width *= 2) {
        for (int32_t stride = width / 2; stride > 0; stride /= 2) {
            __syncwarp();
            for (int32_t n = threadIdx.x; n < length / 2; n += kWARP) {
                int32_t const low = 2 * n - (n & (stride - 1)), high = low + stride;
                bool const ascending = (low & width) == 0;
                unsigned long long const a = keys[low], b = keys[high];
                if ((a > b) == ascending) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    }
    __syncwarp();
}

//! Room for the kept keys and one more warp of them, as a power of two.
__host__ __device__ inline int32_t keyRoom(int32_t groupSize) {
    int32_t room = 2 * kWARP;
    while (room < groupSize + kWARP) {
        room *= 2;
    }
    return room;
}

//! neighborhood [groups, groupSize, 3], knnIdx [groups, groupSize], points [count, 3], idx [groups]
__global__ void __launch_bounds__(kWARP)
    knnGroupKernel(float* neighborhood, int32_t* knnIdx, float const* points, int32_t const* idx,
                   int32_t count, int32_t groupSize, void* workspace) {
    extern __shared__ unsigned long long keys[];
    int32_t const room = keyRoom(groupSize), numTiles = tileCount(count), size = tileSize(count);
    auto* boxDistance = reinterpret_cast<uint32_t*>(keys + room); // bits; kFULL once visited
    TileView const tiles(workspace, count);
    int32_t const lane = threadIdx.x, group = blockIdx.x, center = idx[group];
    float const px = points[3 * center], py = points[3 * center + 1], pz = points[3 * center + 2];
    for (int32_t t = lane; t < numTiles; t += kWARP) {
        boxDistance[t] = __float_as_uint(tiles.box[t].distanceSq(px, py, pz));
    }
    for (int32_t n = lane; n < room; n += kWARP) {
        keys[n] = ~0ULL;
    }
    __syncwarp();

    int32_t found = 0;                // keys in use; ~0 beyond them
    unsigned long long bound = ~0ULL; // the S-th key so far
    while (true) {
        uint32_t nearest = kFULL;
        int32_t tile = 0;
        for (int32_t t = lane; t < numTiles; t += kWARP) {
            if (boxDistance[t] < nearest) {
                nearest = boxDistance[t];
                tile = t;
            }
        }
        for (int32_t offset = kWARP / 2; offset > 0; offset /= 2) {
            uint32_t const other = __shfl_xor_sync(kFULL, nearest, offset);
            int32_t const otherTile = __shfl_xor_sync(kFULL, tile, offset);
            bool const closer = other < nearest || (other == nearest && otherTile < tile);
            nearest = closer ? other : nearest;
            tile = closer ? otherTile : tile;
        }
        if (nearest == kFULL || nearest > static_cast<uint32_t>(bound >> 32)) {
            break;
        }
        if (lane == tile % kWARP) { // it alone reads this one
            boxDistance[tile] = kFULL;
        }
        for (int32_t start = tile * size; start < min((tile + 1) * size, count); start += kWARP) {
            int32_t const i = start + lane;
            unsigned long long key = ~0ULL;
            if (i < min((tile + 1) * size, count)) {
                float const distance = distanceSq(tiles.x[i], tiles.y[i], tiles.z[i], px, py, pz);
                key = static_cast<unsigned long long>(__float_as_uint(distance)) << 32 |
                      static_cast<uint32_t>(tiles.index[i]);
            }
            bool const keep = key < bound;
            uint32_t const kept = __ballot_sync(kFULL, keep);
            if (keep) {
                keys[found + __popc(kept & ((1U << lane) - 1))] = key;
            }
            found += __popc(kept);
            if (kept != 0 && found >= groupSize) {
                sortKeys(keys, room);
                bound = keys[groupSize - 1];
                __syncwarp();
                for (int32_t n = groupSize + lane; n < room; n += kWARP) {
                    keys[n] = ~0ULL;
                }
                found = groupSize;
            }
            __syncwarp();
        }
    }
    for (int32_t s = lane; s < groupSize; s += kWARP) {
        int32_t const member = static_cast<int32_t>(keys[s] & kFULL);
        int64_t const at = static_cast<int64_t>(group) * groupSize + s;
        knnIdx[at] = member;
        neighborhood[3 * at] = sub(points[3 * member], px);
        neighborhood[3 * at + 1] = sub(points[3 * member + 1], py);
        neighborhood[3 * at + 2] = sub(points[3 * member + 2], pz);
    }
}

cudaError_t searchTiles(float* neighborhood, int32_t* knnIdx, float const* points, int32_t const* idx,
                        int32_t count, int32_t groups, int32_t groupSize, void* workspace,
                        cudaStream_t stream) {
    size_t const shared = keyRoom(groupSize) * sizeof(unsigned long long) +
                          static_cast<size_t>(tileCount(count)) * sizeof(uint32_t);
    knnGroupKernel<<<groups, kWARP, shared, stream>>>(neighborhood, knnIdx, points, idx, count, groupSize,
                                                      workspace);
    return cudaGetLastError();
}

} // namespace

// --------------------------------------------------------------------------------------------------------
// launcher

size_t workspaceKnnGroup(int32_t count) {
    return TileView::bytes(count);
}

cudaError_t launchKnnGroup(float* neighborhood, int32_t* knnIdx, float const* points, int32_t const* idx,
                           int32_t count, int32_t groups, int32_t groupSize, void* workspace,
                           cudaStream_t stream) {
    buildTilesKernel<<<1, kTHREADS, 0, stream>>>(points, count, workspace);
    cudaError_t const built = cudaGetLastError();
    return built != cudaSuccess
               ? built
               : searchTiles(neighborhood, knnIdx, points, idx, count, groups, groupSize, workspace, stream);
}

cudaError_t launchPointGroup(int32_t* idx, float* neighborhood, int32_t* knnIdx, float const* points,
                             int32_t count, int32_t numSamples, float minNormSq, int32_t groupSize,
                             void* workspace, cudaStream_t stream) {
    cudaError_t const sampled =
        launchFarthestPointSample(idx, points, nullptr, count, numSamples, minNormSq, workspace, stream);
    return sampled != cudaSuccess ? sampled
                                  : searchTiles(neighborhood, knnIdx, points, idx, count, numSamples,
                                                groupSize, workspace, stream);
}

} // namespace m3ad
