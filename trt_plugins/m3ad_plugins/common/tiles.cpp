#include "tiles.hpp"

#include "arithmetic.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

namespace m3ad {
namespace {

constexpr int32_t kSIDE = 8;         //!< pixels along a tile
constexpr int32_t kMORTON_BITS = 10; //!< per axis
constexpr int32_t kRADIX_BITS = 10;

//! Spreads the low 10 bits of v two apart: the x of a 3-D Morton code.
uint32_t spread(uint32_t v) {
    v = (v | v << 16) & 0x030000FF;
    v = (v | v << 8) & 0x0300F00F;
    v = (v | v << 4) & 0x030C30C3;
    return (v | v << 2) & 0x09249249;
}

//! A stable counting sort of `order` by (key[i] >> shift) & (buckets - 1).
void sortBy(std::vector<uint32_t> const& key, int32_t shift, uint32_t buckets, std::vector<int32_t>& order) {
    std::vector<int32_t> place(buckets + 1);
    for (int32_t const i : order) {
        ++place[((key[i] >> shift) & (buckets - 1)) + 1];
    }
    std::partial_sum(place.begin(), place.end(), place.begin());
    std::vector<int32_t> sorted(order.size());
    for (int32_t const i : order) {
        sorted[place[(key[i] >> shift) & (buckets - 1)]++] = i;
    }
    order.swap(sorted);
}

//! Points in Morton order; `starts` gets the runs of kTILE.
std::vector<int32_t> mortonOrder(float const* points, int32_t count, std::vector<int32_t>& starts) {
    float lo[3], scale[3];
    for (int32_t axis = 0; axis < 3; ++axis) {
        float low = points[axis], high = points[axis];
        for (int32_t i = 1; i < count; ++i) {
            low = std::min(low, points[3 * i + axis]);
            high = std::max(high, points[3 * i + axis]);
        }
        lo[axis] = low;
        // A flat or overflowing axis does not order the points; the tiles stay exact in any order.
        float const step = static_cast<float>((1 << kMORTON_BITS) - 1) / (high - low);
        scale[axis] = std::isfinite(step) ? step : 0.0F;
    }
    std::vector<uint32_t> code(count);
    for (int32_t i = 0; i < count; ++i) {
        for (int32_t axis = 0; axis < 3; ++axis) {
            // Where the axis overflows, so does the difference: no number, which no integer holds.
            float const cell = scale[axis] > 0 ? (points[3 * i + axis] - lo[axis]) * scale[axis] : 0.0F;
            code[i] |= spread(static_cast<uint32_t>(cell)) << axis;
        }
    }
    std::vector<int32_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    for (int32_t shift = 0; shift < 3 * kMORTON_BITS; shift += kRADIX_BITS) {
        sortBy(code, shift, 1U << kRADIX_BITS, order);
    }
    for (int32_t start = 0; start < count; start += kTILE) {
        starts.push_back(start);
    }
    return order;
}

//! Points by tile of kSIDE x kSIDE pixels, by index within a tile; `starts` gets the tiles that hold any.
std::vector<int32_t> pixelOrder(int32_t const* pixel, int32_t count, int32_t imageSize,
                                std::vector<int32_t>& starts) {
    int32_t const across = (imageSize + kSIDE - 1) / kSIDE;
    std::vector<int32_t> place(across * across + 1), order(count);
    auto const tileOf = [&](int32_t i) {
        return pixel[i] / imageSize / kSIDE * across + pixel[i] % imageSize / kSIDE;
    };
    for (int32_t i = 0; i < count; ++i) {
        ++place[tileOf(i) + 1];
    }
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (int32_t tile = 0; tile < across * across; ++tile) {
        if (place[tile] < place[tile + 1]) {
            starts.push_back(place[tile]);
        }
    }
    for (int32_t i = 0; i < count; ++i) {
        order[place[tileOf(i)]++] = i;
    }
    return order;
}

} // namespace

Tiles makeTiles(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize) {
    std::vector<int32_t> starts;
    std::vector<int32_t> order =
        pointPixel ? pixelOrder(pointPixel, count, imageSize, starts) : mortonOrder(points, count, starts);
    starts.push_back(count);
    float constexpr kNAN = std::numeric_limits<float>::quiet_NaN(),
                    kINF = std::numeric_limits<float>::infinity();
    Tiles tiles;
    tiles.tile.resize(starts.size() - 1);
    size_t const padded = (tiles.tile.size() + kBLOCK - 1) / kBLOCK * kBLOCK;
    std::array<std::vector<float>*, 3> const lows{&tiles.loX, &tiles.loY, &tiles.loZ};
    std::array<std::vector<float>*, 3> const highs{&tiles.hiX, &tiles.hiY, &tiles.hiZ};
    for (int32_t axis = 0; axis < 3; ++axis) {
        lows[axis]->assign(padded, kINF);
        highs[axis]->assign(padded, -kINF);
    }
    for (size_t t = 0; t < tiles.tile.size(); ++t) {
        Tile& tile = tiles.tile[t];
        std::sort(order.begin() + starts[t], order.begin() + starts[t + 1]);
        tile.count = starts[t + 1] - starts[t];
        std::array<float*, 3> const lanes{tile.x, tile.y, tile.z};
        for (int32_t axis = 0; axis < 3; ++axis) {
            for (int32_t lane = 0; lane < kTILE; ++lane) {
                lanes[axis][lane] = lane < tile.count ? points[3 * order[starts[t] + lane] + axis] : kNAN;
            }
            (*lows[axis])[t] = *std::min_element(lanes[axis], lanes[axis] + tile.count);
            (*highs[axis])[t] = *std::max_element(lanes[axis], lanes[axis] + tile.count);
        }
        for (int32_t lane = 0; lane < kTILE; ++lane) {
            tile.index[lane] =
                lane < tile.count ? order[starts[t] + lane] : std::numeric_limits<int32_t>::max();
        }
    }
    return tiles;
}

M3AD_CLONES void boxDistanceLoop(Tiles const& tiles, float px, float py, float pz,
                                 float* __restrict distance) {
    float const *loX = tiles.loX.data(), *hiX = tiles.hiX.data(), *loY = tiles.loY.data();
    float const *hiY = tiles.hiY.data(), *loZ = tiles.loZ.data(), *hiZ = tiles.hiZ.data();
    for (int32_t t = 0, count = tiles.paddedSize(); t < count; ++t) {
        distance[t] = normSq(gap(px, loX[t], hiX[t]), gap(py, loY[t], hiY[t]), gap(pz, loZ[t], hiZ[t]));
    }
}

void Tiles::boxDistances(float px, float py, float pz, float* distance) const {
    boxDistanceLoop(*this, px, py, pz, distance);
}

} // namespace m3ad
