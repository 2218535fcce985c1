#include "kernel.hpp"

#include "../common/arithmetic.hpp"
#include "../common/c_api.hpp"
#include "../common/parallel.hpp"
#include "../farthest_point_sample/kernel.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

namespace m3ad {
namespace {

//! Distance bits over index: keys order as (distance, index) do, since distances are not negative.
uint64_t keyOf(float distance, int32_t index) {
    uint32_t bits;
    std::memcpy(&bits, &distance, sizeof bits);
    return uint64_t{bits} << 32 | static_cast<uint32_t>(index);
}

M3AD_CLONES void tileDistances(Tile const& tile, float px, float py, float pz, float* __restrict distance) {
    for (int32_t lane = 0; lane < kTILE; ++lane) {
        distance[lane] = distanceSq(tile.x[lane], tile.y[lane], tile.z[lane], px, py, pz);
    }
}

//! Visits tiles nearest first and stops when the next box is farther than the groupSize-th point found.
class NearestPoints {
public:
    NearestPoints(Tiles const& tiles, int32_t groupSize)
        : mTiles(tiles), mGroupSize(groupSize), mBox(tiles.paddedSize()) {}

    void search(float px, float py, float pz, int32_t* knnIdx) {
        mTiles.boxDistances(px, py, pz, mBox.data());
        mQueue.clear();
        for (int32_t t = 0; t < mTiles.size(); ++t) {
            mQueue.push_back(keyOf(mBox[t], t));
        }
        auto const later = std::greater<uint64_t>();
        std::make_heap(mQueue.begin(), mQueue.end(), later);
        mFound.clear();
        uint64_t bound = std::numeric_limits<uint64_t>::max();
        while (!mQueue.empty() && mQueue.front() >> 32 <= bound >> 32) {
            Tile const& tile = mTiles.tile[static_cast<int32_t>(mQueue.front())];
            std::pop_heap(mQueue.begin(), mQueue.end(), later);
            mQueue.pop_back();
            float distance[kTILE];
            tileDistances(tile, px, py, pz, distance);
            for (int32_t lane = 0; lane < tile.count; ++lane) {
                uint64_t const key = keyOf(distance[lane], tile.index[lane]);
                if (key < bound) {
                    mFound.push_back(key);
                }
            }
            if (static_cast<int32_t>(mFound.size()) > mGroupSize) {
                std::nth_element(mFound.begin(), mFound.begin() + mGroupSize - 1, mFound.end());
                mFound.resize(mGroupSize);
                bound = mFound.back();
            } else if (static_cast<int32_t>(mFound.size()) == mGroupSize) {
                bound = *std::max_element(mFound.begin(), mFound.end());
            }
        }
        std::sort(mFound.begin(), mFound.end());
        for (int32_t s = 0; s < mGroupSize; ++s) {
            knnIdx[s] = static_cast<int32_t>(mFound[s]);
        }
    }

private:
    Tiles const& mTiles;
    int32_t mGroupSize;
    std::vector<float> mBox;
    std::vector<uint64_t> mQueue;
    std::vector<uint64_t> mFound;
};

} // namespace

void knnGroup(Tiles const& tiles, float const* points, int32_t const* idx, int32_t groups, int32_t groupSize,
              float* neighborhood, int32_t* knnIdx, int32_t threads) {
    parallelFor(groups, threads, [&](int32_t begin, int32_t end, int32_t) {
        NearestPoints nearest(tiles, groupSize);
        for (int32_t g = begin; g < end; ++g) {
            float const* center = points + 3 * idx[g];
            int32_t* members = knnIdx + int64_t{g} * groupSize;
            nearest.search(center[0], center[1], center[2], members);
            float* out = neighborhood + int64_t{g} * groupSize * 3;
            for (int32_t s = 0; s < groupSize; ++s) {
                for (int32_t axis = 0; axis < 3; ++axis) {
                    out[3 * s + axis] = sub(points[3 * members[s] + axis], center[axis]);
                }
            }
        }
    });
}

} // namespace m3ad

M3AD_API m3ad_knn_group(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize,
                        int32_t const* idx, int32_t groups, int32_t groupSize, float* neighborhood,
                        int32_t* knnIdx, int32_t threads) {
    return m3ad::guarded([&] {
        m3ad::Tiles const tiles = m3ad::makeTiles(points, pointPixel, count, imageSize);
        m3ad::knnGroup(tiles, points, idx, groups, groupSize, neighborhood, knnIdx, threads);
    });
}

//! FPS and KNN over the same tiles.
M3AD_API m3ad_point_group(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize,
                          int32_t numSamples, float minNormSq, int32_t groupSize, int32_t* idx,
                          float* neighborhood, int32_t* knnIdx, int32_t threads) {
    return m3ad::guarded([&] {
        m3ad::Tiles const tiles = m3ad::makeTiles(points, pointPixel, count, imageSize);
        m3ad::farthestPointSample(tiles, points, numSamples, minNormSq, idx);
        m3ad::knnGroup(tiles, points, idx, numSamples, groupSize, neighborhood, knnIdx, threads);
    });
}
