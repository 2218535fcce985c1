#include "camera_normals.hpp"

#include "arithmetic.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cmath>

namespace m3ad {
namespace {

constexpr int32_t kLEAST = 3;
constexpr int32_t kSWEEPS = 6;

//! One Jacobi rotation of axes P and Q of every lane (Golub, Van Loan, section 8.5).
template <int32_t P, int32_t Q> M3AD_HOST_DEVICE void rotate(Axes& axes) {
    constexpr int32_t kR = 3 - P - Q;
    double* const pp = axes.a[P][P];
    double* const qq = axes.a[Q][Q];
    double* const pq = axes.a[P][Q];
    double* const rp = axes.a[std::min(kR, P)][std::max(kR, P)];
    double* const rq = axes.a[std::min(kR, Q)][std::max(kR, Q)];
    for (int32_t lane = 0; lane < kTILE; ++lane) {
        double const off = pq[lane];
        double const theta = (qq[lane] - pp[lane]) / (off != 0 ? 2 * off : 1);
        double const turned = std::copysign(1.0, theta) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
        double const t = off != 0 ? turned : 0;
        double const c = 1 / std::sqrt(t * t + 1), s = t * c;
        pp[lane] -= t * off;
        qq[lane] += t * off;
        pq[lane] = 0;
        double const ofP = rp[lane], ofQ = rq[lane];
        rp[lane] = c * ofP - s * ofQ;
        rq[lane] = s * ofP + c * ofQ;
        for (int32_t row = 0; row < 3; ++row) {
            double const vp = axes.v[row][P][lane], vq = axes.v[row][Q][lane];
            axes.v[row][P][lane] = c * vp - s * vq;
            axes.v[row][Q][lane] = s * vp + c * vq;
        }
    }
}

M3AD_CLONES void diagonalise(Axes& axes) {
    for (int32_t row = 0; row < 3; ++row) {
        for (int32_t column = 0; column < 3; ++column) {
            std::fill_n(axes.v[row][column], kTILE, row == column ? 1.0 : 0.0);
        }
    }
    for (int32_t sweep = 0; sweep < kSWEEPS; ++sweep) {
        rotate<0, 1>(axes);
        rotate<0, 2>(axes);
        rotate<1, 2>(axes);
    }
}

//! The places of numbers that differ, in ascending order.
M3AD_CLONES void ranks(int32_t const* __restrict numbers, int32_t count, int32_t* __restrict rank) {
    for (int32_t n = 0; n < count; ++n) {
        int32_t lower = 0;
        for (int32_t other = 0; other < count; ++other) {
            lower += numbers[other] < numbers[n];
        }
        rank[n] = lower;
    }
}

} // namespace

CameraNormals::CameraNormals(SlottedCloud const& cloud, double radius, int32_t neighbors)
    : mCloud(cloud), mSquare(radius * radius), mNeighbors(neighbors), mIndex(neighbors), mRank(neighbors),
      mX(neighbors), mY(neighbors), mZ(neighbors) {}

//! Added up in the order of indices, about the first: points with the same neighbours have the same normal to
//! the bit, and rounding does not decide which of the two comes first in a pair.
void CameraNormals::take(int32_t lane, NearPoint* found, int32_t count) {
    int32_t const most = std::min(mNeighbors, count);
    std::nth_element(found, found + most - 1, found + count);
    auto const* const end =
        std::partition(found, found + most, [&](NearPoint const& point) { return point.square < mSquare; });
    int32_t const used = static_cast<int32_t>(end - found);
    for (int32_t n = 0; n < used; ++n) {
        mIndex[n] = found[n].index;
    }
    ranks(mIndex.data(), used, mRank.data());
    for (int32_t n = 0; n < used; ++n) {
        mX[mRank[n]] = mCloud.x[found[n].slot];
        mY[mRank[n]] = mCloud.y[found[n].slot];
        mZ[mRank[n]] = mCloud.z[found[n].slot];
    }
    double const x0 = mX[0], y0 = mY[0], z0 = mZ[0];
    double x = 0, y = 0, z = 0;
    for (int32_t n = 0; n < used; ++n) {
        x += mX[n] -= x0;
        y += mY[n] -= y0;
        z += mZ[n] -= z0;
    }
    x /= used;
    y /= used;
    z /= used;
    double xx = 0, xy = 0, xz = 0, yy = 0, yz = 0, zz = 0;
    for (int32_t n = 0; n < used; ++n) {
        double const dx = mX[n] - x, dy = mY[n] - y, dz = mZ[n] - z;
        xx += dx * dx;
        xy += dx * dy;
        xz += dx * dz;
        yy += dy * dy;
        yz += dy * dz;
        zz += dz * dz;
    }
    mAxes.a[0][0][lane] = xx;
    mAxes.a[0][1][lane] = xy;
    mAxes.a[0][2][lane] = xz;
    mAxes.a[1][1][lane] = yy;
    mAxes.a[1][2][lane] = yz;
    mAxes.a[2][2][lane] = zz;
    mKnown[lane] = used >= kLEAST;
}

void CameraNormals::write(int32_t first, int32_t count, double* nx, double* ny, double* nz) {
    diagonalise(mAxes);
    for (int32_t lane = 0; lane < count; ++lane) {
        double n[3] = {0, 0, 1};
        if (mKnown[lane]) {
            int32_t least = 0;
            for (int32_t axis = 1; axis < 3; ++axis) {
                least = mAxes.a[axis][axis][lane] < mAxes.a[least][least][lane] ? axis : least;
            }
            for (int32_t row = 0; row < 3; ++row) {
                n[row] = mAxes.v[row][least][lane];
            }
        }
        int32_t const slot = first + lane;
        bool const away = n[0] * mCloud.x[slot] + n[1] * mCloud.y[slot] + n[2] * mCloud.z[slot] > 0;
        nx[lane] = away ? -n[0] : n[0];
        ny[lane] = away ? -n[1] : n[1];
        nz[lane] = away ? -n[2] : n[2];
    }
}

} // namespace m3ad
