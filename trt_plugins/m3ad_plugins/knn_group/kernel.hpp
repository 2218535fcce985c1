//! KnnGroup on plain pointers; reference.py is the specification.
//! Inputs are already checked (__init__.py).
#pragma once

#include "../common/tiles.hpp"

#include <cstdint>

namespace m3ad {

//! The groupSize nearest points of each centre by (distance, index): knnIdx [groups, groupSize] and
//! neighborhood [groups, groupSize, 3] = points[knnIdx] - points[idx].
void knnGroup(Tiles const& tiles, float const* points, int32_t const* idx, int32_t groups, int32_t groupSize,
              float* neighborhood, int32_t* knnIdx, int32_t threads);

} // namespace m3ad
