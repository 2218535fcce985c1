//! Runs CUDA kernels on a CPU, thread by thread, so that their logic is tested where there is no GPU: every
//! CUDA thread is a fiber, barriers and warp collectives are where fibers wait for each other. The order in
//! which fibers get their turn is shuffled. Rounding is the host's: the kernels fuse nothing where it
//! matters. Every access is watched for races (race_detector.hpp).
#pragma once

#include "race_detector.hpp"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <ucontext.h>
#include <vector>

#undef __shared__
#undef __device__
#undef __launch_bounds__
#undef __global__
#define __shared__ static
// g++ watches neither a struct that a function gets nor one that it returns: none is left that is called.
#define __device__ __attribute__((always_inline))
#define __launch_bounds__(...)
#define __global__

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWARP = 32;
constexpr size_t kSTACK = 64 << 10;

struct Barrier {
    int expected = 0, arrived = 0;
    uint64_t generation = 0;
    void releaseWhenFull() {
        if (arrived >= expected && arrived > 0) {
            arrived = 0;
            ++generation;
        }
    }
};

struct Warp {
    Barrier barrier;
    uint64_t slot[kWARP];
};

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    std::unique_ptr<char[]> stack{new char[kSTACK]};
    bool started = false, finished = false;
    Barrier* waits = nullptr;
    uint64_t generation = 0;
    unsigned thread = 0;
    race::Place place;
};

inline jmp_buf gScheduler;
inline Fiber* gFiber;
inline std::function<void()> gBody;
inline Barrier gBlock;
inline int gVotes, gVotesRead;
inline std::vector<Warp> gWarps;
inline std::vector<char> gShared;
inline std::mt19937 gRandom{1};

inline Warp& warp() {
    return gWarps[gFiber->thread / kWARP];
}

inline void wait(Barrier& barrier) {
    race::Unwatched const unwatched;
    gFiber->waits = &barrier;
    gFiber->generation = barrier.generation;
    ++barrier.arrived;
    barrier.releaseWhenFull();
    if (_setjmp(gFiber->resume) == 0) {
        _longjmp(gScheduler, 1);
    }
    gFiber->waits = nullptr;
}

inline void enter() {
    race::runs(&gFiber->place);
    gBody();
    race::runs(nullptr);
    gFiber->finished = true;
    for (Barrier* barrier : {&gBlock, &warp().barrier}) { // a thread that left is waited for no more
        --barrier->expected;
        barrier->releaseWhenFull();
    }
    _longjmp(gScheduler, 1);
}

inline void runBlock(std::vector<Fiber>& fibers) {
    unsigned const threads = fibers.size();
    gBlock = Barrier{static_cast<int>(threads)};
    gWarps.assign((threads + kWARP - 1) / kWARP, Warp{});
    for (unsigned t = 0; t < threads; ++t) {
        ++gWarps[t / kWARP].barrier.expected;
        Fiber& fiber = fibers[t];
        fiber.started = fiber.finished = false;
        fiber.waits = nullptr;
        fiber.thread = t;
        fiber.place = {blockIdx.x, t, 0, 0, fiber.stack.get(), kSTACK};
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, kSTACK};
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0U);
    std::shuffle(order.begin(), order.end(), gRandom);
    for (static unsigned left; (left = std::count_if(fibers.begin(), fibers.end(),
                                                     [](Fiber const& f) { return !f.finished; })) > 0;) {
        static bool moved;
        moved = false;
        for (unsigned const t : order) {
            Fiber& fiber = fibers[t];
            if (fiber.finished || (fiber.waits && fiber.waits->generation == fiber.generation)) {
                continue;
            }
            moved = true;
            gFiber = &fiber;
            threadIdx = dim3(t);
            if (_setjmp(gScheduler) == 0) {
                if (fiber.started) {
                    _longjmp(fiber.resume, 1);
                }
                fiber.started = true;
                setcontext(&fiber.context);
            }
        }
        if (!moved) {
            std::fprintf(stderr, "emulator: every thread of block %u waits: a barrier in a branch?\n",
                         blockIdx.x);
            std::abort();
        }
    }
}

//! What a stream that is captured into a graph was given; null while none is.
using Graph = std::vector<std::function<void()>>;
inline Graph* gCaptured;

inline void run(std::function<void()> work) {
    gCaptured ? gCaptured->push_back(std::move(work)) : work();
}

template <typename... Params> struct Launch {
    void (*kernel)(Params...);
    unsigned grid, block;
    size_t shared;

    template <typename... Args> void operator()(Args... args) const {
        run([call = *this, args...] { call.start(args...); });
    }

    template <typename... Args> void start(Args... args) const {
        race::launchStarts();
        gBody = [&] { kernel(args...); };
        gShared.assign(shared, '\xCD');
        std::vector<Fiber> fibers(block);
        blockDim = dim3(block);
        gridDim = dim3(grid);
        for (unsigned b = 0; b < grid; ++b) {
            blockIdx = dim3(b);
            runBlock(fibers);
        }
    }
};

template <typename... Params>
Launch<Params...> launch(void (*kernel)(Params...), unsigned grid, unsigned block, size_t shared,
                         cudaStream_t) {
    return {kernel, grid, block, shared};
}

template <typename T> T* dynamicShared() {
    return reinterpret_cast<T*>(gShared.data());
}

//! Hands every lane's value to `combine(slots, used lanes)`.
template <typename T, typename Combine> auto collective(T value, Combine const& combine) {
    race::Unwatched const unwatched;
    Warp& own = warp();
    std::memcpy(&own.slot[gFiber->thread % kWARP], &value, sizeof value);
    wait(own.barrier);
    auto const result = combine([&](unsigned lane) {
        T other;
        std::memcpy(&other, &own.slot[lane], sizeof other);
        return other;
    });
    wait(own.barrier);
    return result;
}

} // namespace emulator

inline void __syncthreads() {
    race::Unwatched const unwatched;
    emulator::wait(emulator::gBlock);
    ++emulator::gFiber->place.blockBarriers;
}
inline void __syncwarp() {
    race::Unwatched const unwatched;
    emulator::wait(emulator::warp().barrier);
    ++emulator::gFiber->place.warpBarriers;
}
inline int __syncthreads_count(int holds) {
    race::Unwatched const unwatched;
    emulator::gVotes += holds != 0;
    __syncthreads();
    int const votes = emulator::gVotes;
    __syncthreads();
    emulator::gVotes = 0;
    __syncthreads();
    return votes;
}
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    unsigned const source = (threadIdx.x % emulator::kWARP) ^ mask;
    return emulator::collective(value, [&](auto const& of) { return of(source); });
}
template <typename T> T __shfl_up_sync(unsigned, T value, unsigned by) {
    unsigned const lane = threadIdx.x % emulator::kWARP;
    return emulator::collective(value, [&](auto const& of) { return of(lane >= by ? lane - by : lane); });
}
inline unsigned __ballot_sync(unsigned, bool holds) {
    return emulator::collective<uint32_t>(holds, [](auto const& of) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < emulator::kWARP; ++lane) {
            votes |= of(lane) << lane;
        }
        return votes;
    });
}
inline int __reduce_max_sync(unsigned, int value) {
    return emulator::collective(value, [](auto const& of) {
        int most = of(0);
        for (unsigned lane = 1; lane < emulator::kWARP; ++lane) {
            most = std::max(most, of(lane));
        }
        return most;
    });
}
inline int __reduce_min_sync(unsigned mask, int value) {
    return ~__reduce_max_sync(mask, ~value);
}
inline int atomicAdd(int* to, int value) {
    return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

template <typename To, typename From> To bitsAs(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline int __float_as_int(float value) {
    return bitsAs<int>(value);
}
inline unsigned __float_as_uint(float value) {
    return bitsAs<unsigned>(value);
}
inline float __int_as_float(int value) {
    return bitsAs<float>(value);
}
inline int __popc(unsigned value) {
    return __builtin_popcount(value);
}
inline int __ffs(unsigned value) {
    return __builtin_ffs(static_cast<int>(value));
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
using std::max;
using std::min;

// Device memory is the host's.
inline cudaError_t cudaEmulated(bool done) {
    return done ? cudaSuccess : cudaErrorMemoryAllocation;
}
extern "C" {
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
    return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** to, size_t bytes) {
    *to = std::malloc(bytes);
    race::deviceMemory(*to, bytes, true);
    return cudaEmulated(*to != nullptr);
}
inline cudaError_t cudaFree(void* from) {
    race::deviceMemory(from, 0, false);
    return std::free(from), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, void const* from, size_t bytes, cudaMemcpyKind) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    return emulator::run([=] { std::memset(to, value, bytes); }), cudaSuccess;
}
inline char const* cudaGetErrorString(cudaError_t) {
    return "an error of the emulator";
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) {
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaEmulated(emulator::gCaptured == nullptr); // not while it is captured
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    return emulator::gCaptured = new emulator::Graph, cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* to) {
    *to = reinterpret_cast<cudaGraph_t>(std::exchange(emulator::gCaptured, nullptr));
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* to, cudaGraph_t from, unsigned long long) {
    return *to = reinterpret_cast<cudaGraphExec_t>(from), cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    for (auto const& work : *reinterpret_cast<emulator::Graph*>(graph)) {
        work();
    }
    return cudaSuccess;
}
}
