//! NearestRow on plain pointers; reference.py is the specification.
//! Inputs are already checked (__init__.py).
#pragma once

#include <cstdint>

namespace m3ad {

//! distance [queries], idx [queries]: the nearest of bank [rows, width] to each row of x [queries, width].
void nearestRow(float const* x, int32_t queries, int32_t width, float const* bank, int32_t rows,
                float* distance, int32_t* idx, int32_t threads);

} // namespace m3ad
