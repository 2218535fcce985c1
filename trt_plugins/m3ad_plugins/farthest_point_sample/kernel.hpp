//! FarthestPointSample on plain pointers; reference.py is the specification.
//! Inputs are already checked (__init__.py).
#pragma once

#include "../common/tiles.hpp"

#include <cstdint>

namespace m3ad {

//! s_0 = 0, s_k = argmax_n min_{j<k} |p_n - p_{s_j}|^2, ties to the lowest n. Exact: a tile is skipped only
//! when its box is at least as far from the new sample as every point in it is from the samples so far. idx
//! [numSamples]; minNormSq > 0 bars points with |p|^2 <= minNormSq.
void farthestPointSample(Tiles const& tiles, float const* points, int32_t numSamples, float minNormSq,
                         int32_t* idx);

} // namespace m3ad
