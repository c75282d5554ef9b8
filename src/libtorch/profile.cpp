// What a device works on, and for how long, by libtorch's profiler.
#include "guarded.h"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

extern "C" {

// Starts recording what runs on the GPU, or operators on the CPU.
char* pt_profile_start(bool gpu) {
  return guarded([&] {
    using namespace torch::profiler::impl;
    // The profiler reports a missing GPU as an error, even if only operators on the CPU are recorded.
    if (!gpu) setenv("KINETO_LOG_LEVEL", "99", 0);
    ProfilerConfig config(ProfilerState::KINETO);
    std::set<ActivityType> activities{gpu ? ActivityType::CUDA : ActivityType::CPU};
    torch::autograd::profiler::prepareProfiler(config, activities);
    torch::autograd::profiler::enableProfiler(config, activities);
  });
}

// Ends the recording. nanoseconds: for how long at least one kernel, copy or operator ran. `trace`: the file that all of
// them are written to, in Chrome's trace format; may be null.
char* pt_profile_stop(bool gpu, const char* trace, uint64_t* nanoseconds) {
  return guarded([&] {
    auto result = torch::autograd::profiler::disableProfiler();
    if (trace) result->save(trace);
    std::vector<std::pair<uint64_t, uint64_t>> spans;
    for (auto& event : result->events()) {
      if (event.deviceType() == (gpu ? at::kCUDA : at::kCPU)) spans.emplace_back(event.startNs(), event.endNs());
    }
    TORCH_CHECK(!spans.empty(), "the profiler recorded nothing");
    std::sort(spans.begin(), spans.end());
    uint64_t end = 0;
    *nanoseconds = 0;
    for (auto& [from, to] : spans) {
      *nanoseconds += to - std::min(to, std::max(from, end));
      end = std::max(end, to);
    }
  });
}

}  // extern "C"
