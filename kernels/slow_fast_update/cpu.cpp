// The Slow-Fast rule of one layer on the CPU: similarity, decision, permutation of the page table.
//
// Line for line the rule of reference.py, on plain integers; the similarity is a cosine summed in float64. It is a few
// hundred operations: one copy, no vectors, no threads.
#if CF_LEVEL == 0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "bind.h"

namespace cf {
namespace {

struct Rule {
    int sink, slow, fast, slots, frames, keep, rope_length;
    double threshold;
    int interval;
};

struct Table {
    int32_t *page_ids, *positions, *sources, *count, *q_positions, *spare_ids, *promoted, *seen;
    float* last_key;
    int32_t* decision;
    float* similarity;
};

double cosine(const float* a, const float* b, int dim) {
    double dot = 0, aa = 0, bb = 0;
    for (int i = 0; i < dim; ++i) {
        dot += double(a[i]) * b[i];
        aa += double(a[i]) * a[i];
        bb += double(b[i]) * b[i];
    }
    const double size = std::sqrt(aa) * std::sqrt(bb);
    return dot / (size < 1e-16 ? 1e-16 : size);
}

// Move entries [from, from + n) of the ids and of the sources to `to`, a lower place.
void move_down(const Table& t, int to, int from, int n) {
    for (int i = 0; i < n; ++i) {
        t.page_ids[to + i] = t.page_ids[from + i];
        t.sources[to + i] = t.sources[from + i];
    }
}

void put(const Table& t, int slot, int n, int start_frame) {
    for (int i = 0; i < n; ++i) {
        t.page_ids[slot + i] = t.spare_ids[i];
        t.sources[slot + i] = start_frame + i;
    }
}

// Promote the chunk's first pages; returns the action: 0 none, 1 fill, 2 roll.
int promote(const Table& t, const Rule& r, int start_frame, bool can_fill) {
    if (can_fill) {
        put(t, r.sink + *t.promoted, r.keep, start_frame);
        *t.promoted += r.keep;
        return 1;
    }
    if (r.slow <= r.keep) return 0;
    const int low = r.slots - r.fast - r.keep;
    move_down(t, r.sink, r.sink + r.keep, low - r.sink);
    put(t, low, r.keep, start_frame);
    return 2;
}

void choose_spare(const Table& t, const Rule& r) {
    std::vector<bool> used(r.slots + r.frames + 1, false);
    for (int slot = 0; slot < r.slots; ++slot) used[t.page_ids[slot]] = true;
    for (int page = 1, found = 0; found < r.frames; ++page)
        if (!used[page]) t.spare_ids[found++] = page;
}

void update(const Table& t, const float* key_mean, int dim, int start_frame, const Rule& r) {
    double similarity = std::numeric_limits<double>::quiet_NaN();
    bool keyframe = false;
    if (r.interval > 0) {
        keyframe = start_frame >= r.fast && start_frame % r.interval == 0;
    } else if (start_frame >= r.fast) {
        similarity = cosine(key_mean, t.last_key, dim);
        keyframe = similarity < r.threshold;
    }
    std::copy(key_mean, key_mean + dim, t.last_key);

    const bool already = *t.promoted > 0 && t.sources[r.sink + *t.promoted - 1] == start_frame;
    const bool can_fill = r.keep > 0 && r.sink + *t.promoted + r.keep + r.fast <= r.slots;
    const int action = keyframe && !already && r.keep > 0 ? promote(t, r, start_frame, can_fill) : 0;

    const bool shift = start_frame + r.frames > *t.seen && *t.count + r.frames > r.slots;
    if (shift) move_down(t, r.slots - r.fast, r.slots - r.fast + r.frames, r.fast - r.frames);
    const int end = *t.count - (shift ? r.frames : 0) + start_frame + r.frames - *t.seen;
    put(t, end - r.frames, r.frames, start_frame);
    *t.count = end;
    *t.seen = start_frame + r.frames;
    choose_spare(t, r);

    const int anchor = std::min(start_frame + r.frames - 1, r.rope_length - 1);
    const int rest = std::max(0, anchor - (end - r.sink) + 1);
    for (int slot = 0; slot < r.slots; ++slot) t.positions[slot] = slot < r.sink ? slot : rest + slot - r.sink;
    for (int i = 0; i < r.frames; ++i) t.q_positions[i] = std::max(0, anchor - r.frames + 1) + i;
    const int32_t decision[] = {keyframe, already, can_fill, action, shift};
    std::copy(decision, decision + 5, t.decision);
    *t.similarity = float(similarity);
}

// Everything that the rule indexes with, before anything is written.
void check(const Table& t, const Rule& r, int start_frame) {
    const int pages = r.slots + r.frames + 1;
    for (int slot = 0; slot < r.slots; ++slot) check_range("page_ids", slot, t.page_ids[slot], 0, pages, "start from a fresh table");
    for (int i = 0; i < r.frames; ++i) check_range("spare_ids", i, t.spare_ids[i], 0, pages, "start from a fresh table");
    check_range("promoted", 0, *t.promoted, 0, std::max(1, r.slots - r.sink + 1), "start from a fresh table");
    check_range("count", 0, *t.count, 0, r.slots + 1, "start from a fresh table");
    if (r.fast < r.frames || r.sink + r.fast > r.slots)
        fail("sink ", r.sink, " and fast ", r.fast, " do not fit ", r.slots, " slots with chunks of ", r.frames,
             "; enlarge the memory, and fast to at least a chunk");
    if (r.keep > r.frames || (r.keep > 0 && r.slow > r.keep && r.slots - r.fast - r.keep < r.sink))
        fail("keep is ", r.keep, " but a chunk has ", r.frames, " frames and slow memory ", r.slots - r.fast - r.sink,
             "; set MemoryConfig.keep to at most the smaller");
    const bool shift = start_frame + r.frames > *t.seen && *t.count + r.frames > r.slots;
    const int end = *t.count - (shift ? r.frames : 0) + start_frame + r.frames - *t.seen;
    if (end < r.frames || end > r.slots)
        fail("the chunk that starts at frame ", start_frame, " would end in slot ", end, " of ", r.slots, " after ", *t.seen,
             " frames seen; pass chunks in order");
}

}  // namespace

void register_slow_fast_update(pybind11::module_& m) {
    m.def("slow_fast_update", [](const std::array<Pointer, 11>& table, Pointer key_mean, int dim, int start_frame,
                                 const std::array<int, 7>& sizes, double threshold, int interval) {
        const Table t{at<int32_t>(table[0]), at<int32_t>(table[1]), at<int32_t>(table[2]), at<int32_t>(table[3]),
                      at<int32_t>(table[4]), at<int32_t>(table[5]), at<int32_t>(table[6]), at<int32_t>(table[7]),
                      at<float>(table[8]),   at<int32_t>(table[9]), at<float>(table[10])};
        const Rule r{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], threshold, interval};
        check(t, r, start_frame);
        update(t, at<float>(key_mean), dim, start_frame, r);
    });
}

}  // namespace cf
#endif
