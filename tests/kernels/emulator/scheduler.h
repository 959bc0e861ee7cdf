// Runs the fibers of a cluster's blocks in a random order, and a grid cluster by cluster (fibers.h says what is
// random).
#pragma once

#include <sys/mman.h>

#include <csignal>

#include "fibers.h"

namespace cf::emulated {

inline void enter() {
    machine.body();
    self().ended = true;
    --self().warp->live;
    ++machine.progress;
    for (;;) yield();
}

inline void prepare(Thread& thread, unsigned char* stack) {
    auto* top = reinterpret_cast<void**>(stack + kStack);
    top -= 2;
    *top = reinterpret_cast<void*>(&enter);  // cf_switch_stack returns to it, with the stack off by 8 as after a call
    thread.stack = top - 6;
    std::memset(thread.stack, 0, 6 * sizeof(void*));
}

inline void run_lanes(Warp& warp) {
    const int first = int(machine.random() % kWarp);
    for (int i = 0; i < kWarp && machine.error.empty(); ++i) {
        Thread* thread = warp.lanes[(first + i) % kWarp];
        if (!thread || thread->ended) continue;
        machine.current = thread;
        cf_switch_stack(&machine.scheduler, thread->stack);
    }
}

inline std::string standing(const std::vector<Warp*>& warps) {
    std::ostringstream text;
    for (size_t i = 0; i < warps.size(); ++i)
        for (Thread* thread : warps[i]->lanes)
            if (thread && !thread->ended) {
                text << (text.str().empty() ? "" : ", ") << "warp " << i << " in " << thread->at;
                break;
            }
    return text.str();
}

inline void run_cluster() {
    std::vector<Warp*> warps;
    for (auto& block : machine.cluster)
        for (auto& warp : block->warps) warps.push_back(warp.get());
    Warp* favourite = warps[0];
    int idle = 0;
    for (;;) {
        bool any = false;
        for (Warp* warp : warps) any |= warp->live > 0;
        if (!any || !machine.error.empty()) return;
        if (!machine.pending.empty() && machine.random() % 8 == 0) {
            const size_t chosen = machine.random() % machine.pending.size();
            std::function<void()> action = std::move(machine.pending[chosen]);
            machine.pending.erase(machine.pending.begin() + chosen);
            action();
            idle = 0;
        }
        const uint64_t before = machine.progress;
        run_lanes(*favourite);
        const bool moved = machine.progress != before;
        idle = moved || !machine.pending.empty() ? 0 : idle + 1;
        if (idle > 64 * int(warps.size()) + 1024) {
            machine.error = "all threads wait: " + standing(warps);
            return;
        }
        if (!moved || machine.random() % 32 == 0) favourite = warps[machine.random() % warps.size()];
    }
}

inline std::unique_ptr<Block> make_block(int number, int rank, size_t shared_bytes, unsigned char*& stack) {
    auto block = std::make_unique<Block>();
    const Index grid = machine.grid, size = machine.block;
    block->index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    block->rank = rank;
    block->threads = int(size.x * size.y * size.z);
    block->memory.assign(shared_bytes + 2048, 0xff);
    block->shared_bytes = shared_bytes;
    const auto address = reinterpret_cast<uintptr_t>(block->memory.data());
    block->shared = reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
    for (int i = 0; i < block->threads; ++i, stack += kStack) {
        if (i % kWarp == 0) block->warps.push_back(std::make_unique<Warp>());
        auto thread = std::make_unique<Thread>();
        thread->index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        thread->lane = i % kWarp;
        thread->block = block.get();
        thread->warp = block->warps.back().get();
        thread->warp->lanes[thread->lane] = thread.get();
        ++thread->warp->live;
        prepare(*thread, stack);
        block->fibers.push_back(std::move(thread));
    }
    return block;
}

inline void reserve_stacks(size_t count) {
    if (count <= machine.stack_count) return;
    if (machine.stacks) munmap(machine.stacks, machine.stack_count * kStack);
    void* memory =
        mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stacks of ", count, " threads");
    machine.stacks = static_cast<unsigned char*>(memory);
    machine.stack_count = count;
}

inline void on_fault(int) { siglongjmp(machine.fault, 1); }

// An access outside of every operand meets the guard page behind it (tests/kernels/emulator/build.py): catch that.
class FaultTrap {
  public:
    FaultTrap() {
        stack_.ss_sp = memory_;
        stack_.ss_size = sizeof(memory_);
        sigaltstack(&stack_, &old_stack_);
        struct sigaction action = {};
        action.sa_handler = on_fault;
        action.sa_flags = SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &old_);
    }
    ~FaultTrap() {
        sigaction(SIGSEGV, &old_, nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

  private:
    stack_t stack_ = {}, old_stack_ = {};
    struct sigaction old_ = {};
    unsigned char memory_[64 << 10];
};

// Run `body` once per thread of the grid; throws cf::Error where a thread went wrong.
inline void run_grid(Index grid, Index block, size_t shared_bytes, int cluster, std::function<void()> body) {
    machine.random.seed(machine.seed);
    machine.grid = grid;
    machine.block = block;
    machine.body = std::move(body);
    machine.error.clear();
    const int blocks = int(grid.x * grid.y * grid.z), threads = int(block.x * block.y * block.z);
    reserve_stacks(size_t(cluster) * threads);
    std::vector<int> order(blocks / cluster);
    for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.random() % i]);
    FaultTrap trap;
    for (int group : order) {
        unsigned char* stack = machine.stacks;
        machine.cluster.clear();
        machine.pending.clear();
        for (int rank = 0; rank < cluster; ++rank)
            machine.cluster.push_back(make_block(group * cluster + rank, rank, shared_bytes, stack));
        if (sigsetjmp(machine.fault, 1)) {
            const Thread& thread = self();
            machine.error = "thread " + std::to_string(thread.index.x) + " of block " +
                            std::to_string(thread.block->index.x) + " touches memory outside of its operands";
        } else {
            run_cluster();
        }
        if (!machine.error.empty()) fail("emulated kernel: ", machine.error);
    }
    machine.cluster.clear();
}

}  // namespace cf::emulated
