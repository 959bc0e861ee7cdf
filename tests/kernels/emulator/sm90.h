// The wrappers of csrc/cuda/ptx_sm90.cuh on the host, written from the PTX ISA, whose layouts that header tells.
//
// What it catches:
//  - A copy of the copy engine leaves NaN at its destination until it lands, at a random time, some of them late.
//  - A product runs at a random time between its issue and the wait for it. Run early it reads NaN where a copy was not
//    waited for; run late it reads NaN, or other keys, where a stage was released before the wait. Until the wait its
//    sums are NaN, and its operands in registers must not change.
//  - A group of products without a fence before it, which is stricter than the PTX ISA.
//  - Barriers that were not initialised or get more arrivals than they expect, and copies beyond the shared memory.
// What it cannot: a missing fence between proxies; nothing here ever sees stale data.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <unordered_map>

#include "fibers.h"
#include "numbers.h"
#include "ptx_emulated.h"

namespace cf {

struct TensorMap {
    const unsigned char* base;
    int rank, number_bytes, swizzle;
    int64_t extent[5], stride[5];  // strides in bytes
    int32_t box[5];
};

// ---- barriers: arrivals, a phase and bytes, in eight bytes of shared memory -----------------------------------------

namespace emulated {

struct Mbarrier {
    uint16_t wanted;
    uint16_t arrived : 15, phase : 1;
    int32_t bytes;  // announced and not yet landed
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier(uint64_t* place) {
    Mbarrier& barrier = *reinterpret_cast<Mbarrier*>(place);
    if (barrier.wanted == 0xffff || barrier.wanted == 0) stop("an mbarrier is used that was not initialised");
    return barrier;
}
inline void settle(Mbarrier& barrier) {
    if (barrier.arrived < barrier.wanted || barrier.bytes) return;
    barrier.arrived = 0;
    barrier.phase ^= 1;
    ++machine.progress;
}
inline void arrive(Mbarrier& barrier) {
    if (barrier.arrived == barrier.wanted) stop("an mbarrier has more arrivals in a phase than it was told to expect");
    barrier.arrived = barrier.arrived + 1;
    settle(barrier);
}

}  // namespace emulated

namespace emulated {
inline void forget_products();
}
inline void mbarrier_init(uint64_t* barrier, int arrivals) {
    emulated::forget_products();  // of a launch that ended with an error: a block's first act, when none are under way
    *reinterpret_cast<emulated::Mbarrier*>(barrier) = {uint16_t(arrivals), 0, 0, 0};
}
inline void mbarrier_publish() {}
inline void mbarrier_arrive(uint64_t* barrier) { emulated::arrive(emulated::mbarrier(barrier)); }
inline void mbarrier_expect(uint64_t* barrier, int bytes) {
    emulated::mbarrier(barrier).bytes += bytes;
    emulated::arrive(emulated::mbarrier(barrier));
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    emulated::mbarrier(barrier);
    emulated::wait_until("mbarrier_wait", [=] { return emulated::mbarrier(barrier).phase != parity; });
}

// ---- the copy engine ------------------------------------------------------------------------------------------------

namespace emulated {

// Where byte `offset` of a tile lies: 16-byte pieces permuted by the bits of the address above them.
inline uintptr_t swizzled(uintptr_t address, int swizzle) {
    return address ^ (address >> 7 & (swizzle == 128 ? 7 : 3)) << 4;
}

inline void check_shared(const void* to, size_t bytes, size_t unit, const char* name) {
    const Block& block = *self().block;
    const auto* first = static_cast<const unsigned char*>(to);
    if (reinterpret_cast<uintptr_t>(to) % unit) stop(name, " writes to an address that is not a multiple of ", unit);
    if (first < block.shared || first + bytes > block.shared + block.shared_bytes)
        stop(name, " leaves the shared memory");
}

// Half of the copies are held back several times: they land long after others that were started later.
inline void after_delays(int delays, std::function<void()> action) {
    later([=] { delays ? after_delays(delays - 1, action) : action(); });
}

inline void land_later(uint64_t* barrier, int bytes, std::function<void()> write) {
    const int delays = machine.random() % 2 ? int(machine.random() % 32) : 0;
    after_delays(delays, [=] {
        write();
        Mbarrier& landed = mbarrier(barrier);
        landed.bytes -= bytes;
        settle(landed);
        ++machine.progress;
    });
}

inline void copy_box(unsigned char* to, const TensorMap& map, uint64_t* barrier, std::array<int64_t, 5> corner,
                     int rank) {
    if (rank != map.rank) stop("a copy of rank ", rank, " uses a tensor map of rank ", map.rank);
    const int row = map.box[0] * map.number_bytes;
    int rows = 1;
    for (int i = 1; i < rank; ++i) rows *= map.box[i];
    if (row != map.swizzle) stop("rows of a copy have ", row, " bytes but its pattern is for ", map.swizzle);
    check_shared(to, size_t(rows) * row, 128, "copy_tile");
    poison(to, size_t(rows) * row);
    land_later(barrier, rows * row, [=] {
        for (int r = 0; r < rows; ++r) {
            const unsigned char* from = map.base;
            bool inside = true;
            for (int i = 1, left = r; i < rank; left /= map.box[i++]) {
                const int64_t at = corner[i] + left % map.box[i];
                inside = inside && at >= 0 && at < map.extent[i];
                from += at * map.stride[i];
            }
            for (int x = 0; x < map.box[0]; ++x) {
                const int64_t at = corner[0] + x;
                const auto place = reinterpret_cast<uintptr_t>(to) + r * row + x * map.number_bytes;
                auto* there = reinterpret_cast<unsigned char*>(swizzled(place, map.swizzle));
                if (inside && at >= 0 && at < map.extent[0])
                    std::memcpy(there, from + at * map.number_bytes, map.number_bytes);
                else
                    std::memset(there, 0, map.number_bytes);
            }
        }
    });
}

}  // namespace emulated

inline void copy_tile(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    emulated::copy_box(static_cast<unsigned char*>(to), map, barrier, {c0, c1, c2, c3}, 4);
}
inline void copy_tile(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
    emulated::copy_box(static_cast<unsigned char*>(to), map, barrier, {c0, c1, c2, c3, c4}, 5);
}
inline void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        emulated::stop("copy_bytes of ", bytes, " bytes is not in units of 16");
    emulated::check_shared(to, bytes, 16, "copy_bytes");
    emulated::poison(to, bytes);
    emulated::land_later(barrier, bytes, [=] { std::memcpy(to, from, bytes); });
}
inline void prefetch_map(const TensorMap&) {}

template <int>
void take_registers() {}
template <int>
void give_registers() {}

// ---- products: the quarter of a warp, run with its 32 lanes at once -------------------------------------------------

namespace emulated {

struct Sums64 {  // the sums of one array of registers, while products on it are under way
    float value[kWarp][64];
    float* home[kWarp];
    int n;
};

struct Issued {
    std::shared_ptr<Sums64> sums;
    std::function<void()> run;
    const uint32_t* operand[kWarp];
    uint32_t a[kWarp][4];
    bool done = false, committed = false;
    int group = 0;
};

struct WarpProducts {
    std::deque<Issued> queue;
    int commits = 0;
    bool fenced = false;  // since the last commit or wait
};
inline std::unordered_map<Warp*, WarpProducts> products;
inline void forget_products() { products.clear(); }

inline void run_products(WarpProducts& warp, size_t count) {
    for (size_t i = 0; i < count; ++i)
        if (!warp.queue[i].done) {
            warp.queue[i].run();
            warp.queue[i].done = true;
        }
}

struct ProductIn {
    float* d;
    const uint32_t* a;
    uint64_t b;
    int add;
};

template <class T>
float b_number(uint64_t place, int n, int k, bool transposed, const unsigned char* shared) {
    constexpr int bytes = 4 / numbers_in_word<T>;
    const int swizzle = place >> 62 == 1 ? 128 : 64;
    const int64_t start = int64_t(place & 0x3fff) << 4, leap = int64_t(place >> 16 & 0x3fff) << 4;
    const int64_t stride = int64_t(place >> 32 & 0x3fff) << 4;
    int64_t offset;
    if (transposed)  // ((64, n), (8, k)) : ((1, leap), (row, stride)), in numbers of two bytes
        offset = n % 64 * bytes + n / 64 * leap + k % 8 * swizzle + k / 8 * stride;
    else  // ((8, n), 32 bytes) : ((row, stride), 1)
        offset = n % 8 * swizzle + n / 8 * stride + k * bytes;
    // the permutation comes from the address, so patterns begin at multiples of 8 rows
    const auto at = swizzled(reinterpret_cast<uintptr_t>(shared) + start + offset, swizzle);
    uint32_t word = 0;
    std::memcpy(&word, reinterpret_cast<const void*>(at), bytes);
    return wide(T(), word, 0);
}

template <class T, int N>
void run_product(Issued& product, const ProductIn (&in)[kWarp], bool transposed, const unsigned char* shared) {
    constexpr int numbers = numbers_in_word<T>, K = 8 * numbers;
    float a[16][K];
    for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < 4; ++i)
            for (int e = 0; e < numbers; ++e)
                a[lane / 4 + 8 * (i % 2)][(i / 2 * 4 + lane % 4) * numbers + e] = wide(T(), product.a[lane][i], e);
    for (int n = 0; n < N; ++n) {
        float b[K];
        for (int k = 0; k < K; ++k) b[k] = b_number<T>(in[0].b, n, k, transposed, shared);
        for (int row = 0; row < 16; ++row) {
            const int lane = row % 8 * 4 + n % 8 / 2, place = n / 8 * 4 + row / 8 * 2 + n % 2;
            double sum = in[lane].add ? product.sums->value[lane][place] : 0.0;
            for (int k = 0; k < K; ++k) sum += double(a[row][k]) * b[k];
            product.sums->value[lane][place] = float(sum);
        }
    }
}

}  // namespace emulated

inline uint64_t matrix_place(const void* at, int swizzle, int stride, int leap) {
    const auto offset = uint64_t(static_cast<const unsigned char*>(at) - shared_memory());
    if (offset % (8 * swizzle)) emulated::stop("a matrix begins at ", offset, ", inside of a pattern of ", 8 * swizzle);
    return offset >> 4 | uint64_t(leap >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(swizzle == 128 ? 1 : 2) << 62;
}
inline uint64_t matrix_step(uint64_t place, int bytes) { return place + uint64_t(bytes >> 4); }

template <class T, int N, bool transposed>
void wgmma(float* d, const uint32_t (&a)[4], uint64_t b, int add) {
    using namespace emulated;
    Warp* warp = self().warp;
    const unsigned char* shared = shared_memory();
    collective<char>("wgmma", ProductIn{d, a, b, add}, [=](const ProductIn(&in)[kWarp], char(&)[kWarp]) {
        WarpProducts& mine = products[warp];
        if (!mine.fenced) stop("a group of products begins without a wgmma_fence");
        mine.queue.emplace_back();
        Issued& product = mine.queue.back();
        for (Issued& other : mine.queue)
            if (other.sums && other.sums->home[0] == in[0].d) product.sums = other.sums;
        if (!product.sums) {
            product.sums = std::make_shared<Sums64>();
            product.sums->n = N / 2;
            for (int lane = 0; lane < kWarp; ++lane) {
                product.sums->home[lane] = in[lane].d;
                std::memcpy(product.sums->value[lane], in[lane].d, sizeof(float) * N / 2);
                poison(in[lane].d, sizeof(float) * N / 2);
            }
        }
        for (int lane = 0; lane < kWarp; ++lane) {
            product.operand[lane] = in[lane].a;
            std::memcpy(product.a[lane], in[lane].a, sizeof(product.a[lane]));
        }
        std::array<ProductIn, kWarp> inputs;
        std::copy(std::begin(in), std::end(in), inputs.begin());
        product.run = [&product, inputs, shared] {
            ProductIn all[kWarp];
            std::copy(inputs.begin(), inputs.end(), all);
            run_product<T, N>(product, all, transposed, shared);
        };
        if (machine.random() % 2) run_products(mine, mine.queue.size());
    });
}
inline void wgmma_fence() {
    emulated::Warp* warp = emulated::self().warp;
    emulated::collective<char>("wgmma_fence", char(0), [=](auto&, auto&) { emulated::products[warp].fenced = true; });
}
inline void wgmma_commit() {
    using namespace emulated;
    Warp* warp = self().warp;
    collective<char>("wgmma_commit", char(0), [=](auto&, auto&) {
        WarpProducts& mine = products[warp];
        mine.fenced = false;
        ++mine.commits;
        for (Issued& product : mine.queue)
            if (!product.committed) product.committed = true, product.group = mine.commits;
        if (machine.random() % 2) run_products(mine, mine.queue.size());
    });
}
template <int n>
void wgmma_wait() {
    using namespace emulated;
    Warp* warp = self().warp;
    collective<char>("wgmma_wait", char(0), [=](auto&, auto&) {
        WarpProducts& mine = products[warp];
        mine.fenced = false;
        while (!mine.queue.empty() && mine.queue.front().committed && mine.queue.front().group <= mine.commits - n) {
            run_products(mine, 1);
            Issued& product = mine.queue.front();
            for (int lane = 0; lane < kWarp; ++lane) {
                if (std::memcmp(product.operand[lane], product.a[lane], sizeof(product.a[lane])))
                    stop("an operand of a product changed in its registers before the product was waited for");
                if (product.sums.use_count() == 1)  // nothing more is under way on these sums
                    std::memcpy(product.sums->home[lane], product.sums->value[lane], sizeof(float) * product.sums->n);
            }
            mine.queue.pop_front();
        }
    });
}
template <int n>
void wgmma_hold(float (&)[n]) {}
inline void compute_before(float) {}

}  // namespace cf
