// Python classes around the frame ring: RingWriter and RingReader, which cfengine.embed wraps. The ring itself is in
// client/.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <ctime>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "client/writer.h"

namespace py = pybind11;

// From client/session.h, which is C11: whoever is between the two keeps every map of the session.
extern "C" struct cf_mapped_ring* cf_session_enter(cf_session* session);
extern "C" void cf_session_leave(cf_session* session);

namespace cf {
namespace {

// A failure of the C interface, for Python a cfengine.errors.RingError.
struct RingFailure {
    cf_result result;
    std::string text;
};

[[noreturn]] void fail_with(cf_result result) { throw RingFailure{result, cf_last_error()}; }

void check(cf_result result) {
    if (result < 0) fail_with(result);
}

// A C handle that threads share: closed when nobody is inside any more.
template <class T>
class Handle {
  public:
    Handle(T* handle, void (*close)(T*), const char* what) : handle_(handle, close), what_(what) {}

    std::shared_ptr<T> get() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!handle_)
            throw RingFailure{CF_ERROR_INVALID_ARGUMENT, std::string("the ") + what_ + " is closed; open another"};
        return handle_;
    }

    void close() {
        const std::lock_guard<std::mutex> lock(mutex_);
        handle_.reset();
    }

  private:
    std::mutex mutex_;
    std::shared_ptr<T> handle_;
    const char* what_;
};

cf_writer_info info_of(const std::string& name, uint32_t format, uint32_t width, uint32_t height,
                       uint32_t fps_numerator, uint32_t fps_denominator, uint32_t readers, uint32_t slots,
                       uint32_t events, int64_t stall_ns, uint32_t memory, const std::string& handle_socket) {
    return {name.c_str(), format, width,  height,   fps_numerator, fps_denominator,
            readers,      slots,  events, stall_ns, memory,        handle_socket.c_str()};
}

template <class... Arguments>
cf_writer* create(const Arguments&... arguments) {
    const cf_writer_info info = info_of(arguments...);
    cf_writer* writer = nullptr;
    check(cf_writer_create(&info, &writer));
    return writer;
}

uint64_t frame_stride(const std::string& name, uint32_t format, uint32_t width, uint32_t height, uint32_t fps_numerator,
                      uint32_t fps_denominator, uint32_t readers, uint32_t slots, uint32_t events, int64_t stall_ns,
                      uint32_t memory) {
    const std::string none;
    const cf_writer_info info = info_of(name, format, width, height, fps_numerator, fps_denominator, readers, slots,
                                        events, stall_ns, memory, none);
    uint64_t bytes = 0;
    check(cf_writer_frame_stride(&info, &bytes));
    return bytes;
}

class RingWriter {
  public:
    template <class... Arguments>
    explicit RingWriter(const Arguments&... arguments) : writer_(create(arguments...), cf_writer_close, "ring") {}

    // pixels: (height, width, 3 or 4) uint8 whose pixels lie side by side; rows may be strided
    uint64_t publish(const py::array_t<uint8_t>& pixels, int64_t pts_ns, uint64_t chunk, uint64_t last_event_id,
                     uint64_t applied_at_chunk, uint32_t flags) {
        if (pixels.ndim() != 3 || pixels.strides(2) != 1 || pixels.strides(1) != pixels.shape(2) ||
            pixels.strides(0) < 0)
            throw RingFailure{CF_ERROR_INVALID_ARGUMENT,
                              "a frame must be (height, width, 3 or 4) with pixels side by side"};
        const cf_pixels from = {pixels.data(), static_cast<size_t>(pixels.strides(0)),
                                static_cast<uint32_t>(pixels.shape(2)), static_cast<uint32_t>(pixels.shape(1)),
                                static_cast<uint32_t>(pixels.shape(0))};
        const cf_publish_info info = {pts_ns, chunk, last_event_id, applied_at_chunk, flags};
        const auto writer = writer_.get();
        uint64_t id = 0;
        const py::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(publishing_);
        check(cf_writer_publish(writer.get(), from, &info, &id));
        return id;
    }

    // A slot of device memory to be filled: (offsets, strides) of both planes.
    py::tuple begin() {
        const auto writer = writer_.get();
        const std::lock_guard<std::mutex> lock(publishing_);
        cf_writable slot;
        check(cf_writer_begin(writer.get(), &slot));
        return py::make_tuple(py::make_tuple(slot.offsets[0], slot.offsets[1]),
                              py::make_tuple(slot.strides[0], slot.strides[1]));
    }

    // Show that slot, whose id this is.
    uint64_t commit(int64_t pts_ns, uint64_t chunk, uint64_t last_event_id, uint64_t applied_at_chunk, uint32_t flags) {
        const cf_publish_info info = {pts_ns, chunk, last_event_id, applied_at_chunk, flags};
        const auto writer = writer_.get();
        const std::lock_guard<std::mutex> lock(publishing_);
        check(cf_writer_commit(writer.get(), &info));
        cf_writer_stats stats;
        cf_writer_stats_get(writer.get(), &stats);
        return stats.published;
    }

    void cancel() {
        const auto writer = writer_.get();
        const std::lock_guard<std::mutex> lock(publishing_);
        cf_writer_cancel(writer.get());
    }

    // [(kind, id, pushed_ns, text | (code, value) | (position, orientation, time_ns) | None)]
    py::list take_events() {
        const auto writer = writer_.get();
        const std::lock_guard<std::mutex> lock(taking_);  // with the GIL: nothing in here waits
        py::list events;
        cf_writer_event event;
        while (cf_writer_take_event(writer.get(), &event) == CF_SUCCESS) {
            py::object value = py::none();
            const cf_pose& pose = event.pose;
            if (event.kind == CF_EVENT_PROMPT) value = py::str(event.text, event.bytes);
            if (event.kind == CF_EVENT_ACTION) value = py::make_tuple(event.action.code, event.action.value);
            if (event.kind == CF_EVENT_POSE)
                value = py::make_tuple(
                    py::make_tuple(pose.position[0], pose.position[1], pose.position[2]),
                    py::make_tuple(pose.orientation[0], pose.orientation[1], pose.orientation[2], pose.orientation[3]),
                    pose.time_ns);
            events.append(py::make_tuple(event.kind, event.id, event.pushed_ns, value));
        }
        return events;
    }

    void set_state(uint32_t state) { check(cf_writer_set_state(writer_.get().get(), state)); }
    uint32_t state() { return cf_writer_state(writer_.get().get()); }
    void beat() { cf_writer_beat(writer_.get().get()); }
    uint64_t generation() { return cf_writer_generation(writer_.get().get()); }
    void close() { writer_.close(); }

    py::dict stats() {
        cf_writer_stats stats;
        cf_writer_stats_get(writer_.get().get(), &stats);
        return py::dict(py::arg("published") = stats.published, py::arg("revoked") = stats.revoked,
                        py::arg("refused") = stats.refused, py::arg("dropped") = stats.dropped,
                        py::arg("readers") = stats.readers);
    }

  private:
    Handle<cf_writer> writer_;
    std::mutex publishing_, taking_;
};

cf_session* open(const std::string& name, int64_t lease_ns) {
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* session = nullptr;
    info.name = name.c_str();
    info.lease_ns = lease_ns;
    info.flags = CF_SESSION_DEVICE_MEMORY;
    check(cf_session_open(&info, &session));
    return session;
}

// A plane as a read-only array that keeps its memory mapped for as long as it lives.
py::array_t<uint8_t> view(const std::shared_ptr<cf_session>& session, const cf_plane& plane,
                          std::vector<py::ssize_t> shape) {
    struct Keep {
        std::shared_ptr<cf_session> session;
        ~Keep() { cf_session_leave(session.get()); }
    };
    cf_session_enter(session.get());
    const py::capsule base(new Keep{session}, [](void* keep) { delete static_cast<Keep*>(keep); });
    std::vector<py::ssize_t> strides(shape.size(), 1);
    if (shape.size() == 3) strides[1] = shape[2];
    strides[0] = static_cast<py::ssize_t>(plane.stride);
    py::array_t<uint8_t> array(std::move(shape), std::move(strides), static_cast<const uint8_t*>(plane.data), base);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

py::tuple planes_of(const std::shared_ptr<cf_session>& session, const cf_frame& frame) {
    const py::ssize_t height = frame.height, width = frame.width;
    if (frame.memory != CF_MEMORY_HOST) return py::tuple();
    if (frame.format == CF_FORMAT_RGBA8) return py::make_tuple(view(session, frame.planes[0], {height, width, 4}));
    return py::make_tuple(view(session, frame.planes[0], {height, width}),
                          view(session, frame.planes[1], {height / 2, width / 2, 2}));
}

class RingReader {
  public:
    RingReader(const std::string& name, int64_t lease_ns)
        : session_(open(name, lease_ns), [](cf_session* session) { cf_session_close(session); }, "reader") {}

    // A dictionary of the frame, or None where the ring has none to give.
    py::object acquire(uint32_t policy, int64_t display_time_ns, int64_t timeout_ns) {
        const auto session = session_.get();
        cf_acquire_info info = CF_ACQUIRE_INFO_INIT;
        cf_frame frame = CF_FRAME_INIT;
        info.policy = policy;
        info.display_time_ns = display_time_ns;
        info.timeout_ns = timeout_ns;
        cf_result result;
        {
            const py::gil_scoped_release release;
            const std::lock_guard<std::mutex> lock(consuming_);
            result = cf_frame_acquire(session.get(), &info, &frame);
            check(result);
        }
        if (result == CF_NOT_READY) return py::none();
        return py::dict(py::arg("id") = frame.id, py::arg("generation") = frame.generation,
                        py::arg("pts_ns") = frame.pts_ns, py::arg("ready_ns") = frame.ready_ns,
                        py::arg("chunk") = frame.chunk_index, py::arg("last_event_id") = frame.last_event_id,
                        py::arg("applied_at_chunk") = frame.applied_at_chunk, py::arg("flags") = frame.flags,
                        py::arg("format") = frame.format, py::arg("memory") = frame.memory,
                        py::arg("width") = frame.width, py::arg("height") = frame.height,
                        py::arg("offsets") = py::make_tuple(frame.offsets[0], frame.offsets[1]),
                        py::arg("strides") = py::make_tuple(frame.planes[0].stride, frame.planes[1].stride),
                        py::arg("planes") = planes_of(session, frame));
    }

    void release(uint64_t id) {
        const auto session = session_.get();
        const py::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(consuming_);
        check(cf_frame_release(session.get(), id));
    }

    // What the writer gives of its device memory; the file descriptor is the caller's.
    py::dict device_memory() {
        const auto session = session_.get();
        cf_device_memory memory = CF_DEVICE_MEMORY_INIT;
        {
            const py::gil_scoped_release release;
            const std::lock_guard<std::mutex> lock(consuming_);
            check(cf_session_device_memory(session.get(), &memory));
        }
        const auto bytes = [](const uint8_t* data, size_t size) {
            return py::bytes(reinterpret_cast<const char*>(data), size);
        };
        return py::dict(py::arg("memory") = memory.memory, py::arg("generation") = memory.generation,
                        py::arg("size") = memory.size, py::arg("frame_stride") = memory.frame_stride,
                        py::arg("slots") = memory.slots, py::arg("uuid") = bytes(memory.device_uuid, 16),
                        py::arg("fd") = memory.fd, py::arg("ipc_handle") = bytes(memory.ipc_handle, 64));
    }

    uint64_t push_event(cf_event& event) {
        uint64_t id = 0;
        check(cf_session_push(session_.get().get(), &event, &id));
        return id;
    }

    uint64_t push_prompt(const std::string& text) {
        cf_event event = CF_EVENT_INIT;
        event.kind = CF_EVENT_PROMPT;
        event.as.prompt = {text.data(), static_cast<uint32_t>(std::min<size_t>(text.size(), UINT32_MAX))};
        return push_event(event);
    }

    uint64_t push_action(uint32_t code, double value) {
        cf_event event = CF_EVENT_INIT;
        event.kind = CF_EVENT_ACTION;
        event.as.action = {code, value};
        return push_event(event);
    }

    uint64_t push_pose(const std::array<float, 3>& position, const std::array<float, 4>& orientation, int64_t time_ns) {
        cf_event event = CF_EVENT_INIT;
        event.kind = CF_EVENT_POSE;
        event.as.pose = {{position[0], position[1], position[2]},
                         {orientation[0], orientation[1], orientation[2], orientation[3]},
                         time_ns};
        return push_event(event);
    }

    uint64_t push(uint32_t kind) {  // of those without a value
        cf_event event = CF_EVENT_INIT;
        event.kind = kind;
        return push_event(event);
    }

    py::dict state() {
        cf_session_state state = CF_SESSION_STATE_INIT;
        check(cf_session_poll_state(session_.get().get(), &state));
        return py::dict(py::arg("state") = state.state, py::arg("writer_alive") = state.writer_alive != 0,
                        py::arg("generation") = state.generation, py::arg("heartbeat_ns") = state.heartbeat_ns,
                        py::arg("newest_id") = state.newest_id, py::arg("format") = state.format,
                        py::arg("memory") = state.memory, py::arg("width") = state.width,
                        py::arg("height") = state.height, py::arg("fps_numerator") = state.fps_numerator,
                        py::arg("fps_denominator") = state.fps_denominator, py::arg("slots") = state.slots,
                        py::arg("readers") = state.readers);
    }

    py::dict stats() {
        cf_stats stats = CF_STATS_INIT;
        check(cf_stats_get(session_.get().get(), &stats));
        py::dict all;
#define CF_STAT(field) all[#field] = stats.field
        CF_STAT(frames_new);
        CF_STAT(frames_repeated);
        CF_STAT(frames_skipped);
        CF_STAT(frames_late);
        CF_STAT(not_ready);
        CF_STAT(leases_lost);
        CF_STAT(events_pushed);
        CF_STAT(events_refused);
        CF_STAT(generations);
        CF_STAT(acquires);
        CF_STAT(acquire_last_ns);
        CF_STAT(acquire_longest_ns);
        CF_STAT(acquire_total_ns);
#undef CF_STAT
        return all;
    }

    // Nanoseconds of `count` acquires of the newest frame, `period_ns` apart (0: at once), each with its release.
    py::array_t<int64_t> time_acquires(uint64_t count, int64_t period_ns) {
        const auto session = session_.get();
        std::vector<int64_t> times;
        {
            const py::gil_scoped_release release;
            const std::lock_guard<std::mutex> lock(consuming_);
            times.reserve(count);
            for (int64_t next = cf_now_ns(); times.size() < count; next += period_ns) {
                sleep_until(next, period_ns);
                cf_acquire_info info = CF_ACQUIRE_INFO_INIT;
                cf_frame frame = CF_FRAME_INIT;
                const int64_t start = cf_now_ns();
                const cf_result result = cf_frame_acquire(session.get(), &info, &frame);
                times.push_back(cf_now_ns() - start);
                check(result);
                if (result == CF_NOT_READY) throw RingFailure{result, "the ring has no frame yet; publish one first"};
                check(cf_frame_release(session.get(), frame.id));
            }
        }
        return py::array_t<int64_t>(static_cast<py::ssize_t>(times.size()), times.data());
    }

    void close() { session_.close(); }

  private:
    static void sleep_until(int64_t time, int64_t period_ns) {
        const int64_t left = time - cf_now_ns();
        if (period_ns <= 0 || left <= 0) return;
        timespec span = {static_cast<time_t>(left / 1000000000), static_cast<long>(left % 1000000000)};
        while (nanosleep(&span, &span) != 0 && errno == EINTR) continue;
    }

    Handle<cf_session> session_;
    std::mutex consuming_;
};

void raise_in_python(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const RingFailure& failure) {
        const py::object type = py::module_::import("cfengine.errors").attr("RingError");
        const py::object error = type(failure.text, cf_result_name(failure.result));
        PyErr_SetObject(type.ptr(), error.ptr());
    }
}

}  // namespace

void register_ring(py::module_& m) {
    py::register_local_exception_translator(&raise_in_python);
    m.def("ring_now_ns", &cf_now_ns, "The clock of every time in a ring, in nanoseconds.");
    m.def(
        "ring_unlink", [](const std::string& name) { check(cf_writer_unlink(name.c_str())); }, py::arg("name"),
        "Take away the name of a ring whose writer is dead.");
    m.def("ring_frame_stride", &frame_stride, py::arg("name"), py::arg("format"), py::arg("width"), py::arg("height"),
          py::arg("fps_numerator"), py::arg("fps_denominator"), py::arg("readers"), py::arg("slots"), py::arg("events"),
          py::arg("stall_ns"), py::arg("memory"), "Bytes from one slot's frame to the next in a ring of such sizes.");
    py::class_<RingWriter>(m, "RingWriter")
        .def(py::init<std::string, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t,
                      int64_t, uint32_t, std::string>(),
             py::arg("name"), py::arg("format"), py::arg("width"), py::arg("height"), py::arg("fps_numerator"),
             py::arg("fps_denominator"), py::arg("readers"), py::arg("slots"), py::arg("events"), py::arg("stall_ns"),
             py::arg("memory"), py::arg("handle_socket"))
        .def("begin", &RingWriter::begin)
        .def("commit", &RingWriter::commit, py::arg("pts_ns"), py::arg("chunk"), py::arg("last_event_id"),
             py::arg("applied_at_chunk"), py::arg("flags"))
        .def("cancel", &RingWriter::cancel)
        .def("publish", &RingWriter::publish, py::arg("pixels").noconvert(), py::arg("pts_ns"), py::arg("chunk"),
             py::arg("last_event_id"), py::arg("applied_at_chunk"), py::arg("flags"))
        .def("take_events", &RingWriter::take_events)
        .def("set_state", &RingWriter::set_state, py::arg("state"))
        .def("state", &RingWriter::state)
        .def("beat", &RingWriter::beat)
        .def("generation", &RingWriter::generation)
        .def("stats", &RingWriter::stats)
        .def("close", &RingWriter::close);
    py::class_<RingReader>(m, "RingReader")
        .def(py::init<std::string, int64_t>(), py::arg("name"), py::arg("lease_ns"))
        .def("acquire", &RingReader::acquire, py::arg("policy"), py::arg("display_time_ns"), py::arg("timeout_ns"))
        .def("release", &RingReader::release, py::arg("id"))
        .def("device_memory", &RingReader::device_memory)
        .def("push_prompt", &RingReader::push_prompt, py::arg("text"))
        .def("push_action", &RingReader::push_action, py::arg("code"), py::arg("value"))
        .def("push_pose", &RingReader::push_pose, py::arg("position"), py::arg("orientation"), py::arg("time_ns"))
        .def("push", &RingReader::push, py::arg("kind"))
        .def("state", &RingReader::state)
        .def("stats", &RingReader::stats)
        .def("time_acquires", &RingReader::time_acquires, py::arg("count"), py::arg("period_ns"))
        .def("close", &RingReader::close);
}

}  // namespace cf
