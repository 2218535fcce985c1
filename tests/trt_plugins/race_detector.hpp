//! Data races of emulated kernels, by happens-before (race_detector.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace race {

//! Where a CUDA thread is: its accesses carry this.
struct Place {
    uint32_t block = 0;
    uint32_t thread = 0;
    uint32_t blockBarriers = 0;  //!< __syncthreads it has passed
    uint32_t warpBarriers = 0;   //!< __syncwarp it has passed
    char const* stack = nullptr; //!< its own memory, in which nothing can race
    size_t stackBytes = 0;
};

//! Whose turn it is, from here to the end of its code or of its turn. Null: nobody's.
void runs(Place const* place);

//! Launches of a stream follow one another: what earlier kernels did cannot race.
void launchStarts();

//! Memory of the device. All other memory that kernels see is shared memory, which each block has for itself.
void deviceMemory(void const* at, size_t bytes, bool isAllocated);

//! The emulator's own work, which no kernel does.
class Unwatched {
public:
    Unwatched();
    ~Unwatched();

private:
    Place const* mBefore;
};

} // namespace race
