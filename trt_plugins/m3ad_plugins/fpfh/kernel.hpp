//! Fast point feature histograms on plain pointers; `m3ad.fpfh` in NumPy is the specification. Inputs are
//! already checked (__init__.py).
#pragma once

#include <cstdint>

namespace m3ad {

//! Distances in metres; neighbours are nearer than them, and at most so many.
struct FpfhSettings {
    double normalRadius;
    int32_t normalNeighbors;
    double radius;
    int32_t neighbors; //!< not fewer than normalNeighbors, nor is the radius less
};

//! normals [count, 3], which are taken as they are if `hasNormals`, and histograms [count, 33] of points
//! [count, 3]. pointPixel [count] may be null, then imageSize is not used; the results do not depend on it,
//! nor on `threads`.
void fpfh(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize,
          FpfhSettings const& settings, bool hasNormals, double* normals, double* histograms,
          int32_t threads);

} // namespace m3ad
