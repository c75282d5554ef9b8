// Custom kernels: CUDA source, compiled at run time by the NVRTC that comes with libtorch.
#include "launch.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

// The functions used of NVRTC, declared here so that its headers are not needed.
struct Nvrtc {
  using Program = void*;
  int (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*);
  int (*compile)(Program, int, const char* const*);
  int (*size)(Program, size_t*);
  int (*code)(Program, char*);
  int (*log_size)(Program, size_t*);
  int (*log)(Program, char*);
  int (*destroy)(Program*);

  Nvrtc() {
    // Already opened by the program; it lies with libtorch's other libraries and knows where NVRTC is.
    auto* library = dlopen("libcaffe2_nvrtc.so", RTLD_NOW | RTLD_GLOBAL);
    TORCH_CHECK(library, "NVRTC cannot be opened: ", dlerror());
    auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      TORCH_CHECK(function, "NVRTC has no ", name);
    };
    find(create, "nvrtcCreateProgram");
    find(compile, "nvrtcCompileProgram");
    find(size, "nvrtcGetCUBINSize");
    find(code, "nvrtcGetCUBIN");
    find(log_size, "nvrtcGetProgramLogSize");
    find(log, "nvrtcGetProgramLog");
    find(destroy, "nvrtcDestroyProgram");
  }
};

std::string compiled(const char* source, int device) {
  static Nvrtc nvrtc;
  int major, minor;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  auto target = "--gpu-architecture=sm_" + std::to_string(major) + std::to_string(minor);
  const char* options[] = {target.c_str(), "--std=c++17"};
  Nvrtc::Program program;
  TORCH_CHECK(nvrtc.create(&program, source, "polytask.cu", 0, nullptr, nullptr) == 0, "NVRTC takes no program");
  auto failed = nvrtc.compile(program, 2, options);
  size_t size = 0;
  failed ? nvrtc.log_size(program, &size) : nvrtc.size(program, &size);
  std::string text(size, 0);
  failed ? nvrtc.log(program, text.data()) : nvrtc.code(program, text.data());
  nvrtc.destroy(&program);
  TORCH_CHECK(!failed, "a kernel does not compile: ", text);
  return text;
}

cudaLibrary_t loaded(const std::string& code) {
  auto* load = reinterpret_cast<decltype(&cudaLibraryLoadData)>(dlsym(RTLD_DEFAULT, "cudaLibraryLoadData"));
  TORCH_CHECK(load, "this CUDA runtime loads no kernels");
  cudaLibrary_t library;
  C10_CUDA_CHECK(load(&library, code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  return library;
}

// A source, which the first thread that needs it compiles, for the one device of the process.
struct Source {
  std::once_flag compiled_once, loaded_once;
  std::string code, failed;
  cudaLibrary_t library = nullptr;

  static Source& of(const char* text) {
    static std::mutex mutex;
    static std::map<std::string, Source> sources;
    std::lock_guard<std::mutex> lock(mutex);
    return sources[text];
  }

  void compile(const char* text, int device) {
    std::call_once(compiled_once, [&] {
      try {
        code = compiled(text, device);
      } catch (const std::exception& error) {
        failed = error.what();
      }
    });
    TORCH_CHECK(failed.empty(), failed);
  }
};

}  // namespace

void launch(
    void* kernel, dim3 grid, dim3 block, uint32_t shared, const std::vector<at::Tensor>& tensors, const std::vector<int32_t>& numbers,
    const void* listed) {
  std::vector<void*> pointers, arguments;
  for (auto& tensor : tensors) {
    TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), "a kernel needs contiguous tensors on the GPU");
    pointers.push_back(tensor.data_ptr());
  }
  for (auto& pointer : pointers) arguments.push_back(&pointer);
  for (auto& number : numbers) arguments.push_back(const_cast<int32_t*>(&number));
  if (listed) arguments.push_back(const_cast<void*>(listed));
  auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaLaunchKernel(kernel, grid, block, arguments.data(), shared, stream));
}

extern "C" {

// Compiles a source, so that its kernels are found sooner.
char* pt_kernel_compile(const char* source, int device) {
  return guarded([&] { Source::of(source).compile(source, device); });
}

// Finds the kernel `name` in `source`; each source is compiled once per process.
char* pt_kernel_find(const char* source, const char* name, void** out) {
  return guarded([&] {
    // Looked up at run time: some versions of CUDA 12 lack it, and graphs do not need it.
    auto* get = reinterpret_cast<decltype(&cudaLibraryGetKernel)>(dlsym(RTLD_DEFAULT, "cudaLibraryGetKernel"));
    TORCH_CHECK(get, "this CUDA runtime loads no kernels");
    auto& own = Source::of(source);
    own.compile(source, c10::cuda::current_device());
    std::call_once(own.loaded_once, [&] { own.library = loaded(own.code); });
    cudaKernel_t kernel;
    C10_CUDA_CHECK(get(&kernel, own.library, name));
    *out = kernel;
  });
}

// The kernel's arguments: pointers to the memory of `tensors`, `numbers` as int, then the list unless it is null.
char* pt_kernel_launch(
    void* kernel, const uint32_t grid[2], const uint32_t block[2], uint32_t shared, size_t n, const Handle* tensors, size_t m,
    const int32_t* numbers, const void* listed) {
  return guarded([&] {
    launch(
        kernel, {grid[0], grid[1]}, {block[0], block[1]}, shared, list(tensors, n), std::vector<int32_t>(numbers, numbers + m),
        listed);
  });
}

// The peak number of bytes that libtorch reserved on the current device.
char* pt_peak_memory(int64_t* out) {
  return guarded([&] {
    auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(c10::cuda::current_device());
    *out = stats.reserved_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  });
}

}  // extern "C"
