//! The linear map of TokenInterpolate on plain pointers; reference.py is the specification.
//! Inputs are already checked (__init__.py).
#pragma once

#include <cstdint>

namespace m3ad {

//! The interpolation operator as sparse rows, one for each of scoredPixel [rows], pixels of a grid of
//! outputSize. indptr [rows + 1]; indices and weights have room for capacity entries a row: the taps of both
//! axes with 3 centres each.
void interpolationOperator(float const* points, int32_t const* pointPixel, int32_t count,
                           float const* centers, int32_t groups, int32_t const* scoredPixel, int32_t rows,
                           int32_t imageSize, int32_t outputSize, int32_t capacity, int32_t* indptr,
                           int32_t* indices, float* weights, int32_t threads);

} // namespace m3ad
