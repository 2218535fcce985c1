//! Happens-before race detection for kernels that cuda_emulator.hpp runs. Kernels are compiled with
//! -fsanitize=thread, so g++ calls a function before every access to memory; these functions are here instead
//! of in libtsan, because barriers of CUDA have a structure that makes the answer exact and cheap. Within a
//! block, a was before b if b's thread has passed more __syncthreads than a's thread then had, or, in one
//! warp, more __syncwarp. Blocks of a launch are never ordered. Shuffles, votes and reductions order nothing,
//! as CUDA's manual says. (libtsan compares 1024 clocks of 1024 fibers at every barrier, 7 ms, and keeps four
//! accesses a word.)

#include "race_detector.hpp"

#include <algorithm>
#include <cstdio>
#include <dlfcn.h>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

namespace race {

namespace {

Place const* gPlace = nullptr; //!< whose code runs

constexpr uint32_t kWARP = 32;
constexpr uintptr_t kWORD = 4, kPAGE = 4096;

enum class Kind { kREAD, kWRITE, kATOMIC };

//! One access; `code` is its place in the library.
struct Access {
    uint32_t block = 0, blockBarriers = 0, warpBarriers = 0, code = 0;
    uint16_t thread = 0;
    bool isSet = false;

    bool isBefore(Access const& later) const {
        return block == later.block &&
               (thread == later.thread || blockBarriers < later.blockBarriers ||
                (thread / kWARP == later.thread / kWARP && warpBarriers < later.warpBarriers));
    }
};

//! Accesses of one kind that none follows. Two threads of a warp, another warp, another block: whoever comes
//! later and is ordered after these is ordered after all that were left out.
struct Latest {
    Access kept[4];

    void add(Access const& access) {
        bool sameThread = false, sameBlock = false;
        int32_t ofWarp = 0, warps = 0, blocks = 0, free = -1;
        for (int32_t n = 0; n < 4; ++n) {
            Access& old = kept[n];
            if (old.isSet && old.isBefore(access)) {
                old.isSet = false;
            }
            if (!old.isSet) {
                free = n;
                continue;
            }
            bool const inBlock = old.block == access.block;
            bool const inWarp = inBlock && old.thread / kWARP == access.thread / kWARP;
            sameThread |= inWarp && old.thread == access.thread;
            sameBlock |= inBlock;
            ofWarp += inWarp;
            warps += inBlock && !inWarp;
            blocks += !inBlock;
        }
        bool const adds =
            !sameThread &&
            (sameBlock ? (ofWarp == 1 && warps == 0) || (ofWarp == 0 && warps < 2) : blocks < 2);
        if (adds && free >= 0) {
            kept[free] = access;
        }
    }

    Access const* unordered(Access const& now) const {
        for (Access const& old : kept) {
            if (old.isSet && !old.isBefore(now)) {
                return &old;
            }
        }
        return nullptr;
    }
};

struct Cell {
    Latest reads, atomics;
    Access write;
};

struct Page {
    Cell word[kPAGE / kWORD];
    std::map<uint32_t, std::unique_ptr<Cell[]>> bytes; //!< of words that were also accessed in parts
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> gPages;
std::map<uintptr_t, size_t> gDevice;
std::string gFirst;    //!< the first race since the test asked
uintptr_t gLastNumber; //!< of the page that was asked for last
Page* gLast;

uintptr_t libraryBase() {
    static uintptr_t const base = [] {
        Dl_info self;
        dladdr(reinterpret_cast<void*>(&libraryBase), &self);
        return reinterpret_cast<uintptr_t>(self.dli_fbase);
    }();
    return base;
}

bool isDevice(uintptr_t at) {
    auto const next = gDevice.upper_bound(at);
    return next != gDevice.begin() && at < std::prev(next)->first + std::prev(next)->second;
}

void report(Kind kind, Access const& now, char const* oldKind, Access const& old, uintptr_t at) {
    if (!gFirst.empty()) {
        return;
    }
    auto const place = [](Access const& of) {
        char text[80];
        std::snprintf(text, sizeof text, " by block %u thread %u at +0x%x", of.block, of.thread, of.code);
        return std::string(text);
    };
    char const* const names[] = {"read", "write", "atomic"};
    gFirst = std::string(isDevice(at) ? "device" : "shared") + " memory: " + oldKind + place(old) +
             ", then " + names[static_cast<int32_t>(kind)] + place(now) +
             " with nothing between that orders them";
}

void check(Cell& cell, Kind kind, Access const& now, uintptr_t at) {
    // What another block left in this shared memory is gone.
    auto const look = [&](Access const* old, char const* name) {
        if (old != nullptr && (old->block == now.block || isDevice(at))) {
            report(kind, now, name, *old, at);
        }
    };
    look(cell.write.isSet && !cell.write.isBefore(now) ? &cell.write : nullptr, "write");
    if (kind != Kind::kREAD) {
        look(cell.reads.unordered(now), "read");
    }
    if (kind != Kind::kATOMIC) {
        look(cell.atomics.unordered(now), "atomic");
    }
    if (kind == Kind::kWRITE) {
        cell = Cell{};
        cell.write = now;
    } else {
        (kind == Kind::kREAD ? cell.reads : cell.atomics).add(now);
    }
}

void access(void const* address, size_t bytes, Kind kind, void const* code) {
    auto const at = reinterpret_cast<uintptr_t>(address);
    if (gPlace == nullptr || at - reinterpret_cast<uintptr_t>(gPlace->stack) < gPlace->stackBytes) {
        return;
    }
    Access const now{gPlace->block,
                     gPlace->blockBarriers,
                     gPlace->warpBarriers,
                     static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - libraryBase()),
                     static_cast<uint16_t>(gPlace->thread),
                     true};
    for (uintptr_t word = at / kWORD * kWORD; word < at + bytes; word += kWORD) {
        if (gLast == nullptr || word / kPAGE != gLastNumber) {
            std::unique_ptr<Page>& page = gPages[word / kPAGE];
            page = page ? std::move(page) : std::make_unique<Page>();
            gLastNumber = word / kPAGE;
            gLast = page.get();
        }
        auto const n = static_cast<uint32_t>(word % kPAGE / kWORD);
        bool const isWhole = at <= word && word + kWORD <= at + bytes;
        if (isWhole && (gLast->bytes.empty() || gLast->bytes.count(n) == 0)) {
            check(gLast->word[n], kind, now, word);
            continue;
        }
        std::unique_ptr<Cell[]>& parts = gLast->bytes[n];
        if (!parts) {
            parts.reset(new Cell[kWORD]);
            std::fill(&parts[0], &parts[kWORD], gLast->word[n]);
        }
        for (uintptr_t byte = std::max(word, at); byte < std::min(word + kWORD, at + bytes); ++byte) {
            check(parts[byte - word], kind, now, byte);
        }
    }
}

} // namespace

void runs(Place const* place) {
    gPlace = place;
}

Unwatched::Unwatched() : mBefore(gPlace) {
    gPlace = nullptr;
}

Unwatched::~Unwatched() {
    gPlace = mBefore;
}

void launchStarts() {
    gPages.clear();
    gLast = nullptr;
}

void deviceMemory(void const* at, size_t bytes, bool isAllocated) {
    auto const first = reinterpret_cast<uintptr_t>(at);
    if (isAllocated) {
        gDevice[first] = bytes;
    } else {
        gDevice.erase(first);
    }
}

} // namespace race

// ------------------------------------------------------------------------------------------------------------
// what the test asks, and what g++ calls

extern "C" {

char const* raceFirst() {
    return race::gFirst.c_str();
}
void raceForget() {
    race::gFirst.clear();
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define M3AD_ACCESS(bytes)                                                                                   \
    void __tsan_read##bytes(void* at) {                                                                      \
        race::access(at, bytes, race::Kind::kREAD, __builtin_return_address(0));                             \
    }                                                                                                        \
    void __tsan_write##bytes(void* at) {                                                                     \
        race::access(at, bytes, race::Kind::kWRITE, __builtin_return_address(0));                            \
    }                                                                                                        \
    void __tsan_unaligned_read##bytes(void* at) {                                                            \
        race::access(at, bytes, race::Kind::kREAD, __builtin_return_address(0));                             \
    }                                                                                                        \
    void __tsan_unaligned_write##bytes(void* at) {                                                           \
        race::access(at, bytes, race::Kind::kWRITE, __builtin_return_address(0));                            \
    }
M3AD_ACCESS(1)
M3AD_ACCESS(2)
M3AD_ACCESS(4)
M3AD_ACCESS(8)
M3AD_ACCESS(16)
#undef M3AD_ACCESS

void __tsan_read_range(void* at, size_t bytes) {
    race::access(at, bytes, race::Kind::kREAD, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
    race::access(at, bytes, race::Kind::kWRITE, __builtin_return_address(0));
}
int32_t __tsan_atomic32_fetch_add(int32_t volatile* at, int32_t value, int32_t) {
    race::access(const_cast<int32_t*>(at), 4, race::Kind::kATOMIC, __builtin_return_address(0));
    int32_t const before = *at;
    *at = before + value;
    return before;
}
}
