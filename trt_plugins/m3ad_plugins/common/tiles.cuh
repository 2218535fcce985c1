//! Points sorted into tiles that lie close together, built by one block: the search structure of FPS and KNN.
//! The bounding box is halved 13 times along its then longest side; points are counting-sorted by the cell
//! they fall into and cut into runs. Results do not depend on the order inside a cell: every choice is by
//! (distance, index).
#pragma once

#include "arithmetic.hpp"
#include "warp.cuh"

#include <cfloat>
#include <cstddef>
#include <cstdint>

namespace m3ad {

constexpr int32_t kTHREADS = 1024; //!< of the one block: a thread owns at most one tile
constexpr int32_t kCELL_BITS = 13;
constexpr int32_t kCELLS = 1 << kCELL_BITS;

//! Points per tile: 64 up to 65536 points, then as many as keep one tile to a thread.
__host__ __device__ inline int32_t tileSize(int32_t count) {
    int32_t const even = ((count + kTHREADS - 1) / kTHREADS + kWARP - 1) / kWARP * kWARP;
    return even < 64 ? 64 : even;
}

__host__ __device__ inline int32_t tileCount(int32_t count) {
    return (count + tileSize(count) - 1) / tileSize(count);
}

struct Box {
    float lo[3];
    float hi[3];

    __device__ float distanceSq(float x, float y, float z) const {
        return normSq(gap(x, lo[0], hi[0]), gap(y, lo[1], hi[1]), gap(z, lo[2], hi[2]));
    }
};

//! Views of the workspace: sorted points as one array per axis, their indices, FPS's running distances,
//! boxes.
struct TileView {
    float* x;
    float* y;
    float* z;
    float* closest;
    int32_t* index;
    Box* box;

    __host__ __device__ TileView(void* workspace, int32_t count) {
        x = static_cast<float*>(workspace);
        y = x + count;
        z = y + count;
        closest = z + count;
        index = reinterpret_cast<int32_t*>(closest + count);
        box = reinterpret_cast<Box*>(index + count);
    }

    static size_t bytes(int32_t count) {
        return static_cast<size_t>(count) * 5 * sizeof(float) +
               static_cast<size_t>(tileCount(count)) * sizeof(Box);
    }
};

//! The axes along which the box is halved, one per bit, and the cell of a point.
struct Cells {
    Box box;
    int8_t axis[kCELL_BITS];

    __device__ void plan() {
        float side[3] = {sub(box.hi[0], box.lo[0]), sub(box.hi[1], box.lo[1]), sub(box.hi[2], box.lo[2])};
        for (int32_t bit = 0; bit < kCELL_BITS; ++bit) {
            int32_t const longest =
                side[0] >= side[1] ? (side[0] >= side[2] ? 0 : 2) : (side[1] >= side[2] ? 1 : 2);
            axis[bit] = static_cast<int8_t>(longest);
#pragma unroll
            for (int32_t k = 0; k < 3; ++k) {
                side[k] = mul(side[k], k == longest ? 0.5F : 1.0F); // side[longest] is no register
            }
        }
    }

    __device__ int32_t of(float x, float y, float z) const {
        float lo[3] = {box.lo[0], box.lo[1], box.lo[2]};
        float hi[3] = {box.hi[0], box.hi[1], box.hi[2]};
        float const point[3] = {x, y, z};
        int32_t cell = 0;
#pragma unroll
        for (int32_t bit = 0; bit < kCELL_BITS; ++bit) {
            // Picking by comparison keeps the arrays in registers.
            int32_t const a = axis[bit];
#pragma unroll
            for (int32_t k = 0; k < 3; ++k) {
                if (k == a) {
                    float const middle = add(mul(0.5F, lo[k]), mul(0.5F, hi[k]));
                    bool const upper = point[k] > middle;
                    cell = 2 * cell + upper;
                    (upper ? lo[k] : hi[k]) = middle;
                }
            }
        }
        return cell;
    }
};

//! Shared memory of buildTiles.
struct BuildShared {
    Cells cells;
    Box warpBox[kWARP];
    int32_t warpSum[kWARP];
    int32_t place[kCELLS]; //!< per cell: points in it, then where its next point goes
};

__device__ inline Box warpBox(float const lo[3], float const hi[3]) {
    Box box;
    for (int32_t axis = 0; axis < 3; ++axis) {
        box.lo[axis] = warpMin(lo[axis]);
        box.hi[axis] = warpMax(hi[axis]);
    }
    return box;
}

//! Exclusive prefix sum of place[kCELLS] by the whole block.
__device__ inline void scanCells(BuildShared& shared) {
    constexpr int32_t kPER_THREAD = kCELLS / kTHREADS;
    int32_t const thread = threadIdx.x, lane = thread % kWARP, warp = thread / kWARP;
    int32_t own[kPER_THREAD], sum = 0;
    for (int32_t i = 0; i < kPER_THREAD; ++i) {
        own[i] = shared.place[thread * kPER_THREAD + i];
        sum += own[i];
    }
    int32_t upTo = sum;
    for (int32_t offset = 1; offset < kWARP; offset *= 2) {
        int32_t const below = __shfl_up_sync(kFULL, upTo, offset);
        upTo += lane >= offset ? below : 0;
    }
    if (lane == kWARP - 1) {
        shared.warpSum[warp] = upTo;
    }
    __syncthreads();
    int32_t start = upTo - sum;
    for (int32_t w = 0; w < warp; ++w) {
        start += shared.warpSum[w];
    }
    for (int32_t i = 0; i < kPER_THREAD; ++i) {
        shared.place[thread * kPER_THREAD + i] = start;
        start += own[i];
    }
    __syncthreads();
}

//! Sorts points [count, 3] into tiles. To be called by all kTHREADS threads of a block; ends with a barrier.
__device__ inline void buildTiles(float const* points, int32_t count, TileView tiles, BuildShared& shared) {
    int32_t const thread = threadIdx.x, lane = thread % kWARP, warp = thread / kWARP;
    float lo[3] = {FLT_MAX, FLT_MAX, FLT_MAX}, hi[3] = {-FLT_MAX, -FLT_MAX, -FLT_MAX};
    for (int32_t i = thread; i < count; i += kTHREADS) {
        for (int32_t axis = 0; axis < 3; ++axis) {
            lo[axis] = fminf(lo[axis], points[3 * i + axis]);
            hi[axis] = fmaxf(hi[axis], points[3 * i + axis]);
        }
    }
    Box const part = warpBox(lo, hi);
    if (lane == 0) {
        shared.warpBox[warp] = part;
    }
    for (int32_t cell = thread; cell < kCELLS; cell += kTHREADS) {
        shared.place[cell] = 0;
    }
    __syncthreads();
    if (warp == 0) {
        Box const whole = warpBox(shared.warpBox[lane].lo, shared.warpBox[lane].hi);
        if (lane == 0) {
            shared.cells.box = whole;
            shared.cells.plan();
        }
    }
    __syncthreads();
    for (int32_t i = thread; i < count; i += kTHREADS) {
        atomicAdd(&shared.place[shared.cells.of(points[3 * i], points[3 * i + 1], points[3 * i + 2])], 1);
    }
    __syncthreads();
    scanCells(shared);
    for (int32_t i = thread; i < count; i += kTHREADS) {
        float const x = points[3 * i], y = points[3 * i + 1], z = points[3 * i + 2];
        int32_t const at = atomicAdd(&shared.place[shared.cells.of(x, y, z)], 1);
        tiles.x[at] = x;
        tiles.y[at] = y;
        tiles.z[at] = z;
        tiles.index[at] = i;
    }
    __syncthreads();
    int32_t const size = tileSize(count);
    for (int32_t t = warp; t < tileCount(count); t += kTHREADS / kWARP) {
        float tileLo[3] = {FLT_MAX, FLT_MAX, FLT_MAX}, tileHi[3] = {-FLT_MAX, -FLT_MAX, -FLT_MAX};
        for (int32_t i = t * size + lane; i < min((t + 1) * size, count); i += kWARP) {
            float const point[3] = {tiles.x[i], tiles.y[i], tiles.z[i]};
            for (int32_t axis = 0; axis < 3; ++axis) {
                tileLo[axis] = fminf(tileLo[axis], point[axis]);
                tileHi[axis] = fmaxf(tileHi[axis], point[axis]);
            }
        }
        Box const box = warpBox(tileLo, tileHi);
        if (lane == 0) {
            tiles.box[t] = box;
        }
    }
    __syncthreads();
}

} // namespace m3ad
