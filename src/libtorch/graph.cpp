// CUDA graphs of the stream that pt_use_cuda makes current. With kernels.cpp and functions.cpp this is a shared library of its own,
// opened after libtorch_cuda.so, whose symbols it needs; on the CPU it is never opened.
#include "guarded.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

struct Recording {
  at::cuda::CUDAGraph graph;
  c10::DeviceIndex device = c10::cuda::current_device();
  at::cuda::MempoolId_t pool;
};

namespace {

// Cleans up after a failed recording: libtorch 2.11 still regards this device's allocators and generator as recording,
// and refuses to draw or to free until they are reset.
void clear_away(const Recording& recording) {
  auto quietly = [](auto f) {
    try {
      f();
    } catch (...) {
    }
  };
  quietly([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(recording.device, recording.pool); });
  quietly([&] { at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(recording.pool); });
  quietly([&] {
    at::Generator generator = at::cuda::detail::getDefaultCUDAGenerator(recording.device);
    generator.graphsafe_set_state(generator.clone());
  });
}

}  // namespace

extern "C" {

// Returns unused memory to the device. While recording, the allocator does not do so when memory runs out.
char* pt_release_memory() {
  return guarded([] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}

// Starts to record this thread's work on CUDA. `pool` is the id of the recordings' common memory; zeros at first.
char* pt_graph_begin(uint64_t pool[2], Recording** out) {
  return guarded([&] {
    c10::cuda::device_synchronize();
    if (pool[0] == 0 && pool[1] == 0) {
      auto id = at::cuda::graph_pool_handle();
      pool[0] = id.first, pool[1] = id.second;
    }
    auto recording = std::make_unique<Recording>();
    recording->pool = {pool[0], pool[1]};
    try {
      recording->graph.capture_begin(recording->pool);
    } catch (...) {
      clear_away(*recording);
      throw;
    }
    *out = recording.release();
  });
}

// Ends the recording, which after an error can only be freed.
char* pt_graph_end(Recording* recording) {
  return guarded([&] {
    try {
      recording->graph.capture_end();
    } catch (...) {
      clear_away(*recording);
      throw;
    }
  });
}

char* pt_graph_replay(Recording* recording) {
  return guarded([&] { recording->graph.replay(); });
}

void pt_graph_free(Recording* recording) { delete recording; }

}  // extern "C"
