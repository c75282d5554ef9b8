// CUDA graphs. With kernels.cpp a library of its own, which the program opens after libtorch_cuda.so: it finds there what it needs,
// and a program on the CPU does without it.
#include "guarded.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

using c10::cuda::CUDAStream;

struct Recording {
  at::cuda::CUDAGraph graph;
  CUDAStream before = c10::cuda::getCurrentCUDAStream();
  at::cuda::MempoolId_t pool;
};

namespace {

// All recordings share one stream, so that they can share memory.
CUDAStream side_stream() {
  static CUDAStream stream = c10::cuda::getStreamFromPool();
  return stream;
}

// What a recording that failed leaves behind: libtorch 2.11 still takes this device's allocators and generator to be recording,
// and refuses to draw or to free until they are told otherwise.
void clear_away(const Recording& recording) {
  auto quietly = [](auto f) {
    try {
      f();
    } catch (...) {
    }
  };
  auto device = recording.before.device_index();
  c10::cuda::setCurrentCUDAStream(recording.before);
  quietly([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(device, recording.pool); });
  quietly([&] { at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(recording.pool); });
  quietly([&] {
    at::Generator generator = at::cuda::detail::getDefaultCUDAGenerator(device);
    generator.graphsafe_set_state(generator.clone());
  });
}

}  // namespace

extern "C" {

// Starts to record what this thread does on CUDA. `pool` is the id of the memory that recordings share; zeros at first.
char* pt_graph_begin(uint64_t pool[2], Recording** out) {
  return guarded([&] {
    c10::cuda::device_synchronize();
    if (pool[0] == 0 && pool[1] == 0) {
      auto id = at::cuda::graph_pool_handle();
      pool[0] = id.first, pool[1] = id.second;
    }
    auto recording = std::make_unique<Recording>();
    recording->pool = {pool[0], pool[1]};
    c10::cuda::setCurrentCUDAStream(side_stream());
    try {
      recording->graph.capture_begin(recording->pool);
    } catch (...) {
      clear_away(*recording);
      throw;
    }
    *out = recording.release();
  });
}

// Ends the recording; after an error it can only be freed.
char* pt_graph_end(Recording* recording) {
  return guarded([&] {
    try {
      recording->graph.capture_end();
    } catch (...) {
      clear_away(*recording);
      throw;
    }
    c10::cuda::setCurrentCUDAStream(recording->before);
  });
}

char* pt_graph_replay(Recording* recording) {
  return guarded([&] { recording->graph.replay(); });
}

void pt_graph_free(Recording* recording) { delete recording; }

}  // extern "C"
