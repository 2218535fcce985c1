#include "near_points.hpp"

#include "arithmetic.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace m3ad {
namespace {

constexpr double kINF = std::numeric_limits<double>::infinity();
//! More than what the roots and the square of a bound can be rounded by.
constexpr double kSLACK = 1 + 1e-12;

template <typename Some> auto sides(Some& boxes) {
    return std::array{&boxes.loX, &boxes.hiX, &boxes.loY, &boxes.hiY, &boxes.loZ, &boxes.hiZ};
}

M3AD_HOST_DEVICE double normSq(double x, double y, double z) {
    return (x * x + y * y) + z * z;
}

//! As `gap` and `reach` of arithmetic.hpp: rounding is monotone, so no rounded distance to a point in [lo,
//! hi] is less than the gap or more than the reach.
M3AD_HOST_DEVICE double gap(double p, double lo, double hi) {
    double const below = lo - p, above = p - hi;
    double const larger = below > above ? below : above;
    return larger > 0 ? larger : 0;
}

M3AD_HOST_DEVICE double reach(double p, double lo, double hi) {
    double const above = hi - p, below = p - lo;
    return above > below ? above : below;
}

//! Between two intervals, likewise.
M3AD_HOST_DEVICE double between(double lo, double hi, double otherLo, double otherHi) {
    double const above = otherLo - hi, below = lo - otherHi;
    double const larger = below > above ? below : above;
    return larger > 0 ? larger : 0;
}

M3AD_CLONES void boxGaps(Boxes const& boxes, int32_t count, double px, double py, double pz,
                         double* __restrict out) {
    double const *loX = boxes.loX.data(), *hiX = boxes.hiX.data(), *loY = boxes.loY.data();
    double const *hiY = boxes.hiY.data(), *loZ = boxes.loZ.data(), *hiZ = boxes.hiZ.data();
    for (int32_t t = 0; t < count; ++t) {
        out[t] = normSq(gap(px, loX[t], hiX[t]), gap(py, loY[t], hiY[t]), gap(pz, loZ[t], hiZ[t]));
    }
}

//! Squared gaps of all boxes to box `to`.
M3AD_CLONES void boxesBetween(Boxes const& boxes, int32_t count, int32_t to, double* __restrict out) {
    double const *loX = boxes.loX.data(), *hiX = boxes.hiX.data(), *loY = boxes.loY.data();
    double const *hiY = boxes.hiY.data(), *loZ = boxes.loZ.data(), *hiZ = boxes.hiZ.data();
    double const fromX = loX[to], toX = hiX[to], fromY = loY[to], toY = hiY[to], fromZ = loZ[to],
                 toZ = hiZ[to];
    for (int32_t t = 0; t < count; ++t) {
        out[t] = normSq(between(fromX, toX, loX[t], hiX[t]), between(fromY, toY, loY[t], hiY[t]),
                        between(fromZ, toZ, loZ[t], hiZ[t]));
    }
}

M3AD_CLONES void squares(double const* __restrict x, double const* __restrict y, double const* __restrict z,
                         int32_t count, double px, double py, double pz, double* __restrict out) {
    for (int32_t n = 0; n < count; ++n) {
        out[n] = normSq(x[n] - px, y[n] - py, z[n] - pz);
    }
}

//! Of each of some points, the distance to its last neighbour and from there to another.
M3AD_CLONES void waysThrough(double const* __restrict farthest, double const* __restrict square,
                             int32_t count, double* __restrict out) {
    for (int32_t n = 0; n < count; ++n) {
        out[n] = farthest[n] + std::sqrt(square[n]);
    }
}

} // namespace

SlottedCloud::SlottedCloud(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize) {
    Tiles const made = makeTiles(points, pointPixel, count, imageSize);
    x.reserve(count);
    y.reserve(count);
    z.reserve(count);
    index.reserve(count);
    starts.push_back(0);
    for (Tile const& tile : made.tile) {
        x.insert(x.end(), tile.x, tile.x + tile.count);
        y.insert(y.end(), tile.y, tile.y + tile.count);
        z.insert(z.end(), tile.z, tile.z + tile.count);
        index.insert(index.end(), tile.index, tile.index + tile.count);
        starts.push_back(size());
    }
    std::array<std::vector<float> const*, 6> const from{&made.loX, &made.hiX, &made.loY,
                                                        &made.hiY, &made.loZ, &made.hiZ};
    for (size_t side = 0; side < from.size(); ++side) {
        sides(boxes)[side]->assign(from[side]->begin(), from[side]->begin() + made.size());
    }
}

NearPoints::NearPoints(SlottedCloud const& cloud, double radius, int32_t neighbors)
    : mCloud(cloud), mSquare(radius * radius), mNeighbors(neighbors), mGap(cloud.tiles()) {
    for (auto* side : sides(mNearBoxes)) {
        side->resize(cloud.tiles());
    }
}

void NearPoints::begin(int32_t tile) {
    mFirst = mCloud.starts[tile];
    mFirstBound = reachOfTiles(mFirst);
    double farthest = 0;
    for (int32_t slot = mFirst; slot < mCloud.starts[tile + 1]; ++slot) {
        farthest =
            std::max(farthest, normSq(mCloud.x[slot] - mCloud.x[mFirst], mCloud.y[slot] - mCloud.y[mFirst],
                                      mCloud.z[slot] - mCloud.z[mFirst]));
    }
    double const way = std::sqrt(mFirstBound) + std::sqrt(farthest);
    double const bound = std::min(mSquare, way * way * kSLACK);
    boxesBetween(mCloud.boxes, mCloud.tiles(), tile, mGap.data());
    mNear.clear();
    size_t points = 0;
    for (int32_t t = 0; t < mCloud.tiles(); ++t) {
        if (mGap[t] <= bound) {
            for (size_t side = 0; side < 6; ++side) {
                (*sides(mNearBoxes)[side])[mNear.size()] = (*sides(mCloud.boxes)[side])[t];
            }
            mNear.push_back(t);
            points += mCloud.starts[t + 1] - mCloud.starts[t];
        }
    }
    mFound.resize(std::max(mFound.size(), points));
}

NearPoint* NearPoints::find(int32_t slot, int32_t& count) {
    double const px = mCloud.x[slot], py = mCloud.y[slot], pz = mCloud.z[slot];
    double const bound = std::min(mSquare, slot == mFirst ? mFirstBound : boundFromOthers(slot));
    int32_t const tiles = static_cast<int32_t>(mNear.size());
    boxGaps(mNearBoxes, tiles, px, py, pz, mGap.data());
    NearPoint* const found = mFound.data();
    int32_t used = 0;
    for (int32_t t = 0; t < tiles; ++t) {
        if (mGap[t] > bound) {
            continue;
        }
        int32_t const first = mCloud.starts[mNear[t]], points = mCloud.starts[mNear[t] + 1] - first;
        double square[kTILE];
        squares(&mCloud.x[first], &mCloud.y[first], &mCloud.z[first], points, px, py, pz, square);
        for (int32_t n = 0; n < points; ++n) {
            found[used] = {square[n], mCloud.index[first + n], first + n};
            used += square[n] <= bound && square[n] < mSquare;
        }
    }
    double farthest = kINF;
    if (used >= mNeighbors) {
        std::nth_element(found, found + mNeighbors - 1, found + used);
        used = mNeighbors;
        farthest = std::sqrt(found[used - 1].square);
    }
    mFarthest[slot - mFirst] = farthest;
    count = used;
    return found;
}

//! The square of a distance from a slot within which there are tiles of enough points; infinite if there are
//! none.
double NearPoints::reachOfTiles(int32_t slot) {
    Boxes const& box = mCloud.boxes;
    mReach.clear();
    for (int32_t t = 0; t < mCloud.tiles(); ++t) {
        mReach.emplace_back(normSq(reach(mCloud.x[slot], box.loX[t], box.hiX[t]),
                                   reach(mCloud.y[slot], box.loY[t], box.hiY[t]),
                                   reach(mCloud.z[slot], box.loZ[t], box.hiZ[t])),
                            mCloud.starts[t + 1] - mCloud.starts[t]);
    }
    std::sort(mReach.begin(), mReach.end());
    int32_t points = 0;
    for (auto const& [square, held] : mReach) {
        points += held;
        if (points >= mNeighbors) {
            return square;
        }
    }
    return kINF;
}

//! As many points lie within the way to any other point and on to its last neighbour.
double NearPoints::boundFromOthers(int32_t slot) const {
    int32_t const count = slot - mFirst;
    double square[kTILE], way[kTILE];
    squares(&mCloud.x[mFirst], &mCloud.y[mFirst], &mCloud.z[mFirst], count, mCloud.x[slot], mCloud.y[slot],
            mCloud.z[slot], square);
    waysThrough(mFarthest, square, count, way);
    double const least = *std::min_element(way, way + count);
    return least * least * kSLACK;
}

} // namespace m3ad
