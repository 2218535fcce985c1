#include "kernel.hpp"

#include "../common/arithmetic.hpp"
#include "../common/c_api.hpp"
#include "../common/parallel.hpp"

#include <cstring>
#include <limits>

namespace m3ad {
namespace {

// Squared distances are never negative, so their bits compare as integers do; the mark of a barred or unused
// lane is -1, below them all. Integer maxima vectorise without leave to reorder floats.
constexpr float kBARRED = -1.0F;

int32_t bitsOf(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

//! What FPS keeps per tile: the running distance of each lane, their largest, and the lowest index that has
//! it.
struct Progress {
    std::vector<int32_t> closest; //!< [tiles, kTILE] bits
    std::vector<int32_t> farthest;
    std::vector<int32_t> farthestIndex;
};

M3AD_HOST_DEVICE void summarise(Tile const& tile, int32_t const* closest, int32_t& farthest,
                                int32_t& farthestIndex) {
    int32_t most = std::numeric_limits<int32_t>::min();
    for (int32_t lane = 0; lane < kTILE; ++lane) {
        most = closest[lane] > most ? closest[lane] : most;
    }
    int32_t lowest = std::numeric_limits<int32_t>::max();
    for (int32_t lane = 0; lane < kTILE; ++lane) {
        int32_t const candidate =
            closest[lane] == most ? tile.index[lane] : std::numeric_limits<int32_t>::max();
        lowest = candidate < lowest ? candidate : lowest;
    }
    farthest = most;
    farthestIndex = lowest;
}

M3AD_CLONES Progress start(Tiles const& tiles, float minNormSq) {
    size_t const padded = tiles.paddedSize();
    Progress progress{std::vector<int32_t>(tiles.tile.size() * kTILE),
                      std::vector<int32_t>(padded, bitsOf(kBARRED)),
                      std::vector<int32_t>(padded, std::numeric_limits<int32_t>::max())};
    for (int32_t t = 0; t < tiles.size(); ++t) {
        Tile const& tile = tiles.tile[t];
        int32_t* closest = &progress.closest[t * kTILE];
        for (int32_t lane = 0; lane < kTILE; ++lane) {
            bool const barred = lane >= tile.count || (minNormSq > 0 && normSq(tile.x[lane], tile.y[lane],
                                                                               tile.z[lane]) <= minNormSq);
            closest[lane] = bitsOf(barred ? kBARRED : std::numeric_limits<float>::infinity());
        }
        summarise(tile, closest, progress.farthest[t], progress.farthestIndex[t]);
    }
    return progress;
}

//! Lowers the running distances of every tile the new sample can lower.
M3AD_CLONES void addSample(Tiles const& tiles, float px, float py, float pz, Progress& progress) {
    float const *loX = tiles.loX.data(), *hiX = tiles.hiX.data(), *loY = tiles.loY.data();
    float const *hiY = tiles.hiY.data(), *loZ = tiles.loZ.data(), *hiZ = tiles.hiZ.data();
    int32_t* farthest = progress.farthest.data();
    for (int32_t block = 0, count = tiles.paddedSize(); block < count; block += kBLOCK) {
        int32_t near[kBLOCK];
        int32_t any = 0;
        for (int32_t i = 0; i < kBLOCK; ++i) {
            int32_t const t = block + i;
            float const box =
                normSq(gap(px, loX[t], hiX[t]), gap(py, loY[t], hiY[t]), gap(pz, loZ[t], hiZ[t]));
            float far;
            std::memcpy(&far, &farthest[t], sizeof far);
            near[i] = box < far;
            any |= near[i];
        }
        if (!any) {
            continue;
        }
        for (int32_t i = 0; i < kBLOCK; ++i) {
            if (!near[i]) {
                continue;
            }
            int32_t const t = block + i;
            Tile const& tile = tiles.tile[t];
            int32_t* __restrict closest = &progress.closest[t * kTILE];
            for (int32_t lane = 0; lane < kTILE; ++lane) {
                float const distance = distanceSq(tile.x[lane], tile.y[lane], tile.z[lane], px, py, pz);
                int32_t bits;
                std::memcpy(&bits, &distance, sizeof bits); // an unused lane's NaN lies above every distance
                closest[lane] = bits < closest[lane] ? bits : closest[lane];
            }
            summarise(tile, closest, farthest[t], progress.farthestIndex[t]);
        }
    }
}

//! The lowest index among the points farthest from the samples so far.
M3AD_CLONES int32_t farthestPoint(Progress const& progress) {
    int32_t const* farthest = progress.farthest.data();
    int32_t const* index = progress.farthestIndex.data();
    int32_t const count = static_cast<int32_t>(progress.farthest.size());
    int32_t most = std::numeric_limits<int32_t>::min();
    for (int32_t t = 0; t < count; ++t) {
        most = farthest[t] > most ? farthest[t] : most;
    }
    if (most == bitsOf(kBARRED)) {
        return 0; // nothing may be picked: the first point again, as an argmax over equal values has it
    }
    int32_t lowest = std::numeric_limits<int32_t>::max();
    for (int32_t t = 0; t < count; ++t) {
        int32_t const candidate = farthest[t] == most ? index[t] : std::numeric_limits<int32_t>::max();
        lowest = candidate < lowest ? candidate : lowest;
    }
    return lowest;
}

} // namespace

void farthestPointSample(Tiles const& tiles, float const* points, int32_t numSamples, float minNormSq,
                         int32_t* idx) {
    Progress progress = start(tiles, minNormSq);
    idx[0] = 0;
    for (int32_t k = 1; k < numSamples; ++k) {
        float const* sample = points + 3 * idx[k - 1];
        addSample(tiles, sample[0], sample[1], sample[2], progress);
        idx[k] = farthestPoint(progress);
    }
}

} // namespace m3ad

M3AD_API m3ad_farthest_point_sample(float const* points, int32_t const* pointPixel, int32_t count,
                                    int32_t imageSize, int32_t numSamples, float minNormSq, int32_t* idx) {
    return m3ad::guarded([&] {
        m3ad::Tiles const tiles = m3ad::makeTiles(points, pointPixel, count, imageSize);
        m3ad::farthestPointSample(tiles, points, numSamples, minNormSq, idx);
    });
}
