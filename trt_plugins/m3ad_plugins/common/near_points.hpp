//! The nearest points within a radius of each point of a cloud: exact, by (squared distance in fp64, index),
//! whatever the tiles are.
#pragma once

#include "tiles.hpp"

#include <cstdint>
#include <utility>
#include <vector>

namespace m3ad {

struct Boxes {
    std::vector<double> loX, hiX, loY, hiY, loZ, hiZ;
};

//! A cloud in fp64, its points in the order of their tiles; a place in that order is a slot.
struct SlottedCloud {
    SlottedCloud(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize);

    int32_t size() const { return static_cast<int32_t>(index.size()); }
    int32_t tiles() const { return static_cast<int32_t>(starts.size()) - 1; }

    std::vector<double> x, y, z;
    std::vector<int32_t> index;  //!< of each slot, into the caller's points
    std::vector<int32_t> starts; //!< slots starts[t] .. starts[t + 1] - 1 are tile t
    Boxes boxes;                 //!< of the tiles
};

struct NearPoint {
    double square; //!< m^2
    int32_t index; //!< into the caller's points
    int32_t slot;

    bool operator<(NearPoint const& other) const {
        return square < other.square || (square == other.square && index < other.index);
    }
};

//! One thread's search: of a tile's points one after the other, each bounding the next.
class NearPoints {
public:
    NearPoints(SlottedCloud const& cloud, double radius, int32_t neighbors);

    //! Begins a tile; `find` then takes its slots in ascending order.
    void begin(int32_t tile);

    //! The `neighbors` nearest of a slot, itself or one in its place among them, in no order, and fewer where
    //! fewer are nearer than the radius. The first `count` of what is returned are valid until the next call.
    NearPoint* find(int32_t slot, int32_t& count);

private:
    double reachOfTiles(int32_t slot);
    double boundFromOthers(int32_t slot) const;

    SlottedCloud const& mCloud;
    double const mSquare; //!< of the radius
    int32_t const mNeighbors;
    int32_t mFirst = 0;
    double mFirstBound = 0;
    double mFarthest[kTILE];    //!< distance of the last neighbour of each slot found in this tile
    std::vector<int32_t> mNear; //!< tiles in which this tile's points may have neighbours
    Boxes mNearBoxes;
    std::vector<double> mGap;
    std::vector<std::pair<double, int32_t>> mReach;
    std::vector<NearPoint> mFound;
};

} // namespace m3ad
