//! Points in tiles of at most 64 that lie close together, with their bounding boxes: what lets FPS, KNN and
//! 3-NN skip most points and stay exact. Organised clouds are cut into 8 x 8 pixels, others into runs along a
//! Morton curve.
#pragma once

#include <cstdint>
#include <vector>

namespace m3ad {

constexpr int32_t kTILE = 64;
constexpr int32_t kBLOCK = 16; //!< tiles are tested in blocks of this many

//! Unused lanes hold NaN coordinates (no comparison with them holds) and index INT32_MAX.
struct alignas(64) Tile {
    float x[kTILE];
    float y[kTILE];
    float z[kTILE];
    int32_t index[kTILE]; //!< into the caller's points, ascending
    int32_t count;
};

//! Boxes as one array per side, filled up to a multiple of kBLOCK with boxes infinitely far away.
struct Tiles {
    std::vector<Tile> tile;
    std::vector<float> loX, hiX, loY, hiY, loZ, hiZ;

    int32_t size() const { return static_cast<int32_t>(tile.size()); }
    int32_t paddedSize() const { return static_cast<int32_t>(loX.size()); }

    //! |p - box|^2 of every tile, never more than the rounded distance to a point in it: [paddedSize()].
    void boxDistances(float px, float py, float pz, float* distance) const;
};

//! Builds the tiles of points [count, 3]; pointPixel [count] may be null, then imageSize is not used.
Tiles makeTiles(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize);

} // namespace m3ad
