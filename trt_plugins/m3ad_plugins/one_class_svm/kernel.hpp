//! OneClassSvm on plain pointers; reference.py is the specification.
//! Inputs are already checked (__init__.py).
#pragma once

#include <cstdint>

namespace m3ad {

//! decision [rows] = sum_k c_k k(v_k, x) - rho, k = v.x or, with rbf, exp(-gamma |v - x|^2).
void oneClassSvm(float const* x, int32_t rows, int32_t width, float const* supportVectors,
                 float const* coefficients, int32_t vectors, float rho, bool rbf, float gamma,
                 float* decision, int32_t threads);

} // namespace m3ad
