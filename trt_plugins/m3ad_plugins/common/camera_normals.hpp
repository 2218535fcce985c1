//! Normals of a cloud's points towards the sensor at the origin: `camera_normals` of `m3ad.fpfh`, bit for
//! bit.
#pragma once

#include "near_points.hpp"

#include <cstdint>
#include <vector>

namespace m3ad {

//! A tile's covariances, their eigenvalues and axes: a lane a point.
struct Axes {
    double a[3][3][kTILE]; //!< the upper triangle is used
    double v[3][3][kTILE]; //!< columns are axes
};

//! One thread's normals, a tile at a time: the axis of the smallest eigenvalue of the covariance of the
//! nearest points, or (0, 0, -+1) of fewer than three.
class CameraNormals {
public:
    CameraNormals(SlottedCloud const& cloud, double radius, int32_t neighbors);

    //! The points near the lane's, of which the nearest are used; their order changes.
    void take(int32_t lane, NearPoint* found, int32_t count);

    //! The normals of the slots first .. first + count - 1, lanes 0 .. count - 1.
    void write(int32_t first, int32_t count, double* nx, double* ny, double* nz);

private:
    SlottedCloud const& mCloud;
    double const mSquare; //!< of the radius
    int32_t const mNeighbors;
    Axes mAxes{};
    bool mKnown[kTILE] = {};
    std::vector<int32_t> mIndex, mRank;
    std::vector<double> mX, mY, mZ; //!< in the order of indices
};

} // namespace m3ad
