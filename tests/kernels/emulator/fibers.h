// Runs a CUDA kernel on the host: every thread is a fiber, and all of a cluster's blocks are in flight together.
//
// What it is for: to find wrong layouts, missing waits and missing barriers without a GPU, not speed.
//  - Warps run in a random order, each for a random while; lanes of a warp start at a random one. Another seed is
//  another
//    order, so code that reads what another thread writes needs the barrier that makes it right.
//  - Shared memory starts as NaN. A copy that is under way (copy_async, or what an added wrapper starts with `later`)
//    leaves NaN at its destination until it is waited for.
//  - Warp collectives need all 32 lanes at the same call; a barrier that can never fill ends the launch with an error
//    that says where every warp stands.
// Blocks run one cluster after another: a block may not wait for one of another cluster.
//
// A new wrapper of PTX has its real body in the header of the kernels and its emulated one here, in a header which that
// header includes under `#ifdef CF_EMULATE`, as csrc/cuda/ptx.cuh does with ptx_emulated.h. Bricks to build it from:
//    self()                     the running thread: its index, lane, warp, block
//    collective<Out>(name, in, f)   all 32 lanes meet; f(const In (&)[32], Out (&)[32]) computes for the whole warp
//    wait_until(name, ready)    other threads run until ready() is true: mbarrier waits, named barriers
//    later(action)              action() runs at some later, random time: the asynchronous part of TMA or wgmma
//    poison(address, bytes)     what is being written by such an action is NaN until then
//    peer(rank)                 the block of that rank in the cluster: distributed shared memory
// A cluster's warps run in one operating-system thread and are switched only inside these calls, so everything between
// two of them is atomic. Registers that the hardware reads late (wgmma's A operand) are best read when it is waited
// for.
#pragma once

#if !defined(__x86_64__)
#error "the fibers of this emulator switch stacks in x86-64 assembly"
#endif

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"

namespace cf::emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Index {
    unsigned x, y, z;
};

struct Block;
struct Warp;

struct AsyncCopy {
    unsigned char* to;
    const unsigned char* from;
    int size, bytes;  // size at the destination, of which `bytes` are read and the others zero
};

struct Thread {
    void* stack = nullptr;  // saved stack pointer
    Index index{};
    int lane = 0;
    bool ended = false;
    const char* at = "its start";  // what it waits for
    Warp* warp = nullptr;
    Block* block = nullptr;
    std::vector<AsyncCopy> open;
    std::vector<std::vector<AsyncCopy>> groups;
};

struct Warp {
    Thread* lanes[kWarp] = {};
    int live = 0, arrived = 0;
    uint64_t generation = 0;
    const char* name = "";
    alignas(16) unsigned char in[kWarp][256], out[kWarp][256];
};

struct Barrier {
    int arrived = 0;
    uint64_t generation = 0;
};

struct Block {
    Index index{};
    int rank = 0, threads = 0;
    std::vector<unsigned char> memory;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    Barrier barriers[16];
    std::vector<std::unique_ptr<Thread>> fibers;
    std::vector<std::unique_ptr<Warp>> warps;
};

// The state of a launch; the emulator runs one at a time, in one thread.
struct Machine {
    uint64_t seed = 0;  // set by the test
    std::mt19937_64 random;
    void* scheduler = nullptr;
    Thread* current = nullptr;
    std::vector<std::unique_ptr<Block>> cluster;
    std::vector<std::function<void()>> pending;
    std::function<void()> body;
    uint64_t progress = 0;
    std::string error;
    Index grid{}, block{};
    unsigned char* stacks = nullptr;
    size_t stack_count = 0;
    sigjmp_buf fault;
};

inline Machine machine;

extern "C" void cf_switch_stack(void** from, void* to);
#if defined(CF_EMULATOR_MAIN)
asm(R"(
.text
.globl cf_switch_stack
.type cf_switch_stack, @function
cf_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cf_switch_stack, .-cf_switch_stack
)");
#endif

inline Thread& self() { return *machine.current; }
inline Block& peer(int rank) { return *machine.cluster.at(rank); }
inline void later(std::function<void()> action) { machine.pending.push_back(std::move(action)); }
inline void poison(void* address, size_t bytes) { std::memset(address, 0xff, bytes); }  // NaN in every float format

inline void yield() { cf_switch_stack(&self().stack, machine.scheduler); }

// End the launch with an error; called from a fiber.
template <class... Parts>
[[noreturn]] void stop(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    machine.error = text.str();
    for (;;) yield();
}

// Hold an address of shared memory that a wrapper was given against the launch's size and an alignment.
inline void check_shared(const char* name, const void* address, size_t bytes, size_t alignment) {
    const Block& block = *self().block;
    const auto at = reinterpret_cast<uintptr_t>(address), start = reinterpret_cast<uintptr_t>(block.shared);
    if (at < start || at + bytes > start + block.shared_bytes || at % alignment)
        stop(name, " at byte ", int64_t(at - start), " of ", block.shared_bytes, " of shared memory, in units of ",
             alignment);
}

template <class Ready>
void wait_until(const char* name, Ready ready) {
    self().at = name;
    while (!ready()) yield();
    self().at = "work";
    ++machine.progress;
}

template <class Out, class Argument, class F>
Out collective(const char* name, const Argument& in, F f) {
    typedef std::remove_cv_t<Argument> In;
    static_assert(sizeof(In) <= 256 && sizeof(Out) <= 256);
    Warp& warp = *self().warp;
    if (warp.arrived && std::strcmp(warp.name, name)) stop("lanes of a warp meet in ", warp.name, " and in ", name);
    if (warp.live != kWarp) stop(name, " needs 32 lanes but ", warp.live, " are left in the warp");
    warp.name = name;
    std::memcpy(warp.in[self().lane], &in, sizeof(In));
    if (++warp.arrived == kWarp) {
        In all[kWarp];
        Out results[kWarp];
        for (int lane = 0; lane < kWarp; ++lane) std::memcpy(&all[lane], warp.in[lane], sizeof(In));
        f(all, results);
        for (int lane = 0; lane < kWarp; ++lane) std::memcpy(warp.out[lane], &results[lane], sizeof(Out));
        warp.arrived = 0;
        ++warp.generation;
        ++machine.progress;
        yield();  // the last lane must not run on before the others
    } else {
        const uint64_t before = warp.generation;
        wait_until(name, [&] { return warp.generation != before; });
    }
    Out mine;
    std::memcpy(&mine, warp.out[self().lane], sizeof(Out));
    return mine;
}

inline void barrier_arrive(int id, int threads) {
    Barrier& barrier = self().block->barriers[id];
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
        ++machine.progress;
    }
}

inline void barrier_sync(int id, int threads, const char* name) {
    Barrier& barrier = self().block->barriers[id];
    const uint64_t before = barrier.generation;
    barrier_arrive(id, threads);
    wait_until(name, [&] { return barrier.generation != before; });
}

}  // namespace cf::emulated
