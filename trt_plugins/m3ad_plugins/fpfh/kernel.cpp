#include "kernel.hpp"

#include "../common/arithmetic.hpp"
#include "../common/c_api.hpp"
#include "../common/camera_normals.hpp"
#include "../common/near_points.hpp"
#include "../common/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace m3ad {
namespace {

constexpr int32_t kBINS = 11;
constexpr int32_t kWIDTH = 3 * kBINS;
constexpr int32_t kROW = 40; //!< a histogram in memory: whole registers

//! Memory that is first written by the thread that needs it.
template <typename Value> std::unique_ptr<Value[]> unwritten(size_t size) {
    return std::unique_ptr<Value[]>(new Value[size]);
}

//! What is known of every slot, so that a pair's points lie near each other in memory.
struct Slots {
    Slots(int32_t slots, int32_t others)
        : nx(slots), ny(slots), nz(slots), count(slots), most(others),
          other(unwritten<int32_t>(size_t{1} * slots * others)),
          square(unwritten<double>(size_t{1} * slots * others)),
          simple(unwritten<double>(size_t{1} * slots * kROW)) {}

    size_t row(int32_t slot) const { return static_cast<size_t>(slot) * most; }

    std::vector<double> nx, ny, nz; //!< normals
    std::vector<int32_t> count;     //!< other points near it, at most `most`
    int32_t most;
    std::unique_ptr<int32_t[]> other; //!< [slots, most] slots of these
    std::unique_ptr<double[]> square; //!< [slots, most] their squared distances
    std::unique_ptr<double[]> simple; //!< [slots, kROW] its SPFH
};

//! Neighbours of the slots of tiles begin .. end - 1, and their normals.
void searchTiles(SlottedCloud const& cloud, FpfhSettings const& settings, bool hasNormals, int32_t begin,
                 int32_t end, Slots& slots) {
    NearPoints search(cloud, settings.radius, settings.neighbors);
    CameraNormals normals(cloud, settings.normalRadius, settings.normalNeighbors);
    for (int32_t tile = begin; tile < end; ++tile) {
        search.begin(tile);
        int32_t const first = cloud.starts[tile], stop = cloud.starts[tile + 1];
        for (int32_t slot = first; slot < stop; ++slot) {
            int32_t count;
            NearPoint* const found = search.find(slot, count);
            if (!hasNormals) {
                normals.take(slot - first, found, count);
            }
            // Where more points lie in one place than are kept, the point itself may not be among them.
            NearPoint* const itself = std::find_if(
                found, found + count - 1, [&](NearPoint const& point) { return point.slot == slot; });
            *itself = found[--count];
            slots.count[slot] = count;
            size_t const row = slots.row(slot);
            for (int32_t n = 0; n < count; ++n) {
                slots.other[row + n] = found[n].slot;
                slots.square[row + n] = found[n].square;
            }
        }
        if (!hasNormals) {
            normals.write(first, stop - first, &slots.nx[first], &slots.ny[first], &slots.nz[first]);
        }
    }
}

//! One point's pairs, the others' positions and normals gathered; `bin` gets the bins of theta, alpha and
//! phi.
struct Pairs {
    explicit Pairs(int32_t most)
        : x(most), y(most), z(most), nx(most), ny(most), nz(most),
          bin{std::vector<int32_t>(most), std::vector<int32_t>(most), std::vector<int32_t>(most)} {}
    std::vector<double> x, y, z, nx, ny, nz;
    std::vector<int32_t> bin[3];
};

//! The bin of a share of -1 .. 1.
M3AD_HOST_DEVICE int32_t binOf(double value) {
    double const share = kBINS * ((value + 1) * 0.5);
    double const from0 = share > 0 ? share : 0;
    return static_cast<int32_t>(from0 < kBINS - 1 ? from0 : kBINS - 1);
}

//! The bin of atan2(sine, cosine): how many of the borders at pi/11, 3 pi/11 .. 9 pi/11 it is beyond, on
//! either side.
M3AD_HOST_DEVICE int32_t binOfTurn(double sine, double cosine) {
    constexpr double kCOS[] = {0.95949297361449739, 0.65486073394528506, 0.14231483827328514,
                               -0.41541501300188643, -0.84125353283118117};
    constexpr double kSIN[] = {0.28173255684142970, 0.75574957435425829, 0.98982144188093273,
                               0.90963199535451837, 0.54064081745559758};
    double const up = std::fabs(sine);
    double beyond = 0;
    for (int32_t k = 0; k < kBINS / 2; ++k) {
        beyond += kCOS[k] * up - kSIN[k] * cosine > 0 ? 1.0 : 0.0;
    }
    // Of two zeros, a negative cosine is half a turn, too.
    double const turns = up == 0 && std::copysign(1.0, cosine) < 0 ? kBINS / 2 : beyond;
    return static_cast<int32_t>(kBINS / 2 + std::copysign(turns, sine));
}

M3AD_HOST_DEVICE double dot(double ax, double ay, double az, double bx, double by, double bz) {
    return (ax * bx + ay * by) + az * bz;
}

//! theta = atan2(w.n2, n1.n2), alpha = v.n2, phi = n1.d / |d| of every pair: as `_angles` of the
//! specification, step by step.
M3AD_CLONES void pairBins(double px, double py, double pz, double mx, double my, double mz, int32_t count,
                          Pairs& pairs) {
    double const* __restrict x = pairs.x.data();
    double const* __restrict y = pairs.y.data();
    double const* __restrict z = pairs.z.data();
    double const* __restrict nx = pairs.nx.data();
    double const* __restrict ny = pairs.ny.data();
    double const* __restrict nz = pairs.nz.data();
    int32_t* __restrict ofTheta = pairs.bin[0].data();
    int32_t* __restrict ofAlpha = pairs.bin[1].data();
    int32_t* __restrict ofPhi = pairs.bin[2].data();
    for (int32_t n = 0; n < count; ++n) {
        double const dx = x[n] - px, dy = y[n] - py, dz = z[n] - pz;
        double const length = std::sqrt(dot(dx, dy, dz, dx, dy, dz));
        double const safe = length > 0 ? length : 1;
        double const first = dot(mx, my, mz, dx, dy, dz) / safe;
        double const second = dot(nx[n], ny[n], nz[n], dx, dy, dz) / safe;
        bool const swap = std::fabs(first) < std::fabs(second);
        double const phi = swap ? -second : first;
        double const ax = swap ? nx[n] : mx, ay = swap ? ny[n] : my, az = swap ? nz[n] : mz;
        double const bx = swap ? mx : nx[n], by = swap ? my : ny[n], bz = swap ? mz : nz[n];
        double const ex = swap ? -dx : dx, ey = swap ? -dy : dy, ez = swap ? -dz : dz;
        double vx = ey * az - ez * ay, vy = ez * ax - ex * az, vz = ex * ay - ey * ax;
        double const norm = std::sqrt(dot(vx, vy, vz, vx, vy, vz));
        bool const whole = length > 0 && norm > 0;
        double const by1 = whole ? norm : 1;
        vx /= by1;
        vy /= by1;
        vz /= by1;
        double const wx = ay * vz - az * vy, wy = az * vx - ax * vz, wz = ax * vy - ay * vx;
        int32_t const theta = binOfTurn(dot(wx, wy, wz, bx, by, bz), dot(ax, ay, az, bx, by, bz));
        int32_t const alpha = binOf(dot(vx, vy, vz, bx, by, bz));
        ofTheta[n] = whole ? theta : kBINS / 2;
        ofAlpha[n] = whole ? alpha : kBINS / 2;
        ofPhi[n] = whole ? binOf(phi) : kBINS / 2;
    }
}

//! SPFH of the slots begin .. end - 1: 100 in each block of 11 bins.
void simpleHistograms(SlottedCloud const& cloud, int32_t begin, int32_t end, Slots& slots) {
    Pairs pairs(slots.most);
    for (int32_t slot = begin; slot < end; ++slot) {
        int32_t const* const other = &slots.other[slots.row(slot)];
        int32_t const count = slots.count[slot];
        for (int32_t n = 0; n < count; ++n) {
            pairs.x[n] = cloud.x[other[n]];
            pairs.y[n] = cloud.y[other[n]];
            pairs.z[n] = cloud.z[other[n]];
            pairs.nx[n] = slots.nx[other[n]];
            pairs.ny[n] = slots.ny[other[n]];
            pairs.nz[n] = slots.nz[other[n]];
        }
        pairBins(cloud.x[slot], cloud.y[slot], cloud.z[slot], slots.nx[slot], slots.ny[slot], slots.nz[slot],
                 count, pairs);
        int32_t counted[kWIDTH] = {};
        for (int32_t block = 0; block < 3; ++block) {
            for (int32_t n = 0; n < count; ++n) {
                ++counted[block * kBINS + pairs.bin[block][n]];
            }
        }
        double* const simple = &slots.simple[static_cast<size_t>(slot) * kROW];
        for (int32_t bin = 0; bin < kWIDTH; ++bin) {
            simple[bin] = counted[bin] * (100.0 / std::max(count, 1));
        }
        std::fill(simple + kWIDTH, simple + kROW, 0.0);
    }
}

//! sum_k SPFH_k / d_k^2 of one point, [kROW].
M3AD_CLONES void weighedSum(double const* __restrict simple, int32_t const* __restrict other,
                            double const* __restrict square, int32_t count, double* __restrict out) {
    double sum[kROW] = {};
    for (int32_t n = 0; n < count; ++n) {
        double const weight = square[n] > 0 ? 1 / square[n] : 0;
        double const* const row = simple + static_cast<size_t>(other[n]) * kROW;
        for (int32_t bin = 0; bin < kROW; ++bin) {
            sum[bin] += weight * row[bin];
        }
    }
    std::copy(sum, sum + kROW, out);
}

//! FPFH of the slots begin .. end - 1, to their points' places.
void wholeHistograms(SlottedCloud const& cloud, int32_t begin, int32_t end, Slots const& slots, double* out) {
    for (int32_t slot = begin; slot < end; ++slot) {
        size_t const row = slots.row(slot);
        double sum[kROW];
        weighedSum(slots.simple.get(), &slots.other[row], &slots.square[row], slots.count[slot], sum);
        double const* const simple = &slots.simple[static_cast<size_t>(slot) * kROW];
        double* const whole = out + static_cast<size_t>(cloud.index[slot]) * kWIDTH;
        for (int32_t block = 0; block < kWIDTH; block += kBINS) {
            double total = 0;
            for (int32_t bin = block; bin < block + kBINS; ++bin) {
                total += sum[bin];
            }
            for (int32_t bin = block; bin < block + kBINS; ++bin) {
                whole[bin] = simple[bin] + (total > 0 ? 100 * sum[bin] / total : 0);
            }
        }
    }
}

} // namespace

void fpfh(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize,
          FpfhSettings const& settings, bool hasNormals, double* normals, double* histograms,
          int32_t threads) {
    SlottedCloud const cloud(points, pointPixel, count, imageSize);
    Slots slots(count, std::max(1, std::min(settings.neighbors, count) - 1));
    for (int32_t slot = 0; hasNormals && slot < count; ++slot) {
        double const* const normal = normals + size_t{3} * cloud.index[slot];
        slots.nx[slot] = normal[0];
        slots.ny[slot] = normal[1];
        slots.nz[slot] = normal[2];
    }
    parallelFor(cloud.tiles(), threads, [&](int32_t begin, int32_t end, int32_t) {
        searchTiles(cloud, settings, hasNormals, begin, end, slots);
    });
    for (int32_t slot = 0; !hasNormals && slot < count; ++slot) {
        double* const normal = normals + size_t{3} * cloud.index[slot];
        normal[0] = slots.nx[slot];
        normal[1] = slots.ny[slot];
        normal[2] = slots.nz[slot];
    }
    parallelFor(count, threads,
                [&](int32_t begin, int32_t end, int32_t) { simpleHistograms(cloud, begin, end, slots); });
    parallelFor(count, threads, [&](int32_t begin, int32_t end, int32_t) {
        wholeHistograms(cloud, begin, end, slots, histograms);
    });
}

} // namespace m3ad

M3AD_API m3ad_fpfh(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize,
                   double normalRadius, int32_t normalNeighbors, double radius, int32_t neighbors,
                   int32_t hasNormals, double* normals, double* histograms, int32_t threads) {
    return m3ad::guarded([&] {
        m3ad::fpfh(points, pointPixel, count, imageSize, {normalRadius, normalNeighbors, radius, neighbors},
                   hasNormals != 0, normals, histograms, threads);
    });
}
