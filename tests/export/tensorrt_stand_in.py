"""A stand-in for TensorRT and TensorRT-RTX whose engines are ONNX Runtime's: as much of them as cfengine uses."""

import ctypes
import types
from contextlib import contextmanager

import numpy as np

from cfengine.segments import tensorrt

NUMPY = {"HALF": np.float16, "FLOAT": np.float32}
SIZES = {"first": 1000, "middle": 3000, "last": 2000}  # bytes of workspace that the engines ask for


class Name:
    def __init__(self, name):
        self.name = name


class Context:
    def __init__(self, engine, library):
        self.engine, self.library, self.addresses, self.workspace = engine, library, {}, None

    def set_device_memory(self, pointer, size):
        assert self.library.device == self.engine.device and pointer % tensorrt.ALIGNMENT == 0
        self.workspace = pointer, size

    def set_tensor_address(self, name, pointer):
        if name in self.library.refused:
            self.library.log.log(Name("ERROR"), f"{name} is\nno address")
            return False
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream):
        assert self.library.device == self.engine.device
        if self.library.broken:
            self.library.log.log(Name("ERROR"), "the kernel\nis lost")
            return False
        self.library.streams.append(stream)
        pointer, size = self.workspace
        assert size >= self.engine.device_memory_size_v2
        ctypes.memset(pointer, 255, size)  # what another engine left there must not matter
        session = self.engine.session
        inputs = {i.name: self._array(i.name).copy() for i in session.get_inputs()}
        for output, value in zip(session.get_outputs(), session.run(None, inputs), strict=True):
            self._array(output.name)[:] = value
        return True

    def _array(self, name):
        shape, kind = self.engine.get_tensor_shape(name), NUMPY[self.engine.get_tensor_dtype(name).name]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        memory = (ctypes.c_byte * size).from_address(self.addresses[name])
        return np.frombuffer(memory, kind).reshape(shape)


class Engine:
    kind = Context

    def __init__(self, library, data):
        import onnxruntime

        self.library, self.device = library, library.device
        assert self.device is not None  # CUDA's current one, whatever that is
        self.session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        self._operands = {o.name: o for o in (*self.session.get_inputs(), *self.session.get_outputs())}
        graph = "first" if "latents" in self._operands else "last" if "flow" in self._operands else "middle"
        self.device_memory_size_v2, self.num_io_tensors = SIZES[graph], len(self._operands)

    def get_tensor_name(self, i):
        return list(self._operands)[i]

    def get_tensor_dtype(self, name):
        return Name("HALF" if self._operands[name].type == "tensor(float16)" else "FLOAT")

    def get_tensor_shape(self, name):
        return tuple(self._operands[name].shape)

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        self.library.contexts.append(self.kind(self, self.library))
        return self.library.contexts[-1]


class RtxContext(Context):
    """As TensorRT-RTX has it: what runs here may allocate, and then no graph can hold it."""

    def is_stream_capturable(self, stream):
        assert self.workspace and len(self.addresses) == self.engine.num_io_tensors
        assert not (self.library.capturing and stream in self.library.capturable), "asked for what is known"
        self.library.asked.append(stream)
        return stream in self.library.capturable


class RtxEngine(Engine):
    """As TensorRT-RTX has it: contexts are made with a cache of compiled kernels."""

    kind = RtxContext

    def create_runtime_config(self):
        return RtxConfig(self.library)

    def create_execution_context(self, config):
        assert config.cache is self.library.cache
        return super().create_execution_context(config.strategy)


class RtxConfig:
    def __init__(self, library):
        self.library, self.strategy, self.cache = library, None, None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        self.library.cache = types.SimpleNamespace(serialize=self._serialize, deserialize=self.library.restored.append)
        return self.library.cache

    def _serialize(self):
        assert self.library.device is not None
        return b"kernels"

    def set_runtime_cache(self, cache):
        self.cache = cache


class Parser:
    def __init__(self, network, log):
        self.network, self.num_errors = network, 0

    def parse(self, data):
        self.network["data"] = data
        return True


class Config:
    profiling_verbosity = max_aux_streams = None

    def set_memory_pool_limit(self, pool, size):
        pass

    def create_timing_cache(self, data):
        self.timings = bytes(data)
        return self.timings

    def set_timing_cache(self, cache, ignore_mismatch):
        pass

    def get_timing_cache(self):
        return types.SimpleNamespace(serialize=lambda: self.timings + b"+")


class Library:
    """As much of the module `tensorrt` as is used here."""

    __name__, __version__ = "tensorrt", "11.0"

    def __init__(self):
        self.contexts, self.streams, self.built, self.broken = [], [], 0, False
        self.engine, self.restored, self.refused = Engine, [], ()
        self.device, self.capturing, self.capturable, self.asked = None, False, (), []
        self.BuilderFlag = types.SimpleNamespace()
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.MemoryPoolType = types.SimpleNamespace(WORKSPACE=0)
        self.ProfilingVerbosity = types.SimpleNamespace(DETAILED=2)
        self.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
        self.ILogger, self.OnnxParser = object, Parser

    @contextmanager
    def on_gpu(self, device):
        """What `torch.cuda.device` does, on a machine without one."""
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before

    def Builder(self, log):
        def build(network, config):
            self.built += 1
            log.log(Name("INFO"), "Total Weights Memory: 4000 bytes")
            return network["data"]

        return types.SimpleNamespace(
            create_network=lambda flags: {}, create_builder_config=Config, build_serialized_network=build
        )

    def Runtime(self, log):
        def load(data):
            self.log = log
            if data.startswith(b"no engine"):
                log.log(Name("ERROR"), "magic tag does not match")
                return None
            return self.engine(self, data)

        return types.SimpleNamespace(deserialize_cuda_engine=load)
