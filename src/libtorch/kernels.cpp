// Kernels of our own: CUDA source compiled on the machine that runs it, by the NVRTC that comes with libtorch.
#include "guarded.h"

#include <ATen/ops/embedding.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/autograd/custom_function.h>

#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

// What is used of NVRTC, whose headers are not needed for it.
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
    // The program has opened it, which lies beside libtorch's other libraries and knows where NVRTC is.
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

std::string compiled(const char* source) {
  static Nvrtc nvrtc;
  int major, minor;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, c10::cuda::current_device()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, c10::cuda::current_device()));
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

void launch(
    void* kernel, dim3 grid, dim3 block, uint32_t shared, const std::vector<at::Tensor>& tensors,
    const std::vector<int32_t>& numbers) {
  std::vector<void*> pointers, arguments;
  for (auto& tensor : tensors) {
    TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), "a kernel needs contiguous tensors on the GPU");
    pointers.push_back(tensor.data_ptr());
  }
  for (auto& pointer : pointers) arguments.push_back(&pointer);
  for (auto& number : numbers) arguments.push_back(const_cast<int32_t*>(&number));
  auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaLaunchKernel(kernel, grid, block, arguments.data(), shared, stream));
}

// Rows of a table, whose gradient the kernel of embedding.cu takes.
struct LookUp : torch::autograd::Function<LookUp> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& table, const at::Tensor& ids, int64_t padding, int64_t kernel) {
    context->save_for_backward({ids});
    context->saved_data["rows"] = table.size(0);
    context->saved_data["padding"] = padding;
    context->saved_data["kernel"] = kernel;
    return at::embedding(table, ids);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    auto gradient = gradients[0].contiguous();
    auto ids = context->get_saved_variables()[0].contiguous();
    auto rows = context->saved_data["rows"].toInt(), width = gradient.size(-1), n = ids.numel();
    auto padding = context->saved_data["padding"].toInt();
    auto table = at::zeros({rows, width}, gradient.options());
    auto block = static_cast<uint32_t>(std::min<int64_t>(256, (width + 31) / 32 * 32));
    dim3 grid(n, (width + block - 1) / block);
    auto numbers = std::vector<int32_t>{static_cast<int32_t>(n), static_cast<int32_t>(width), static_cast<int32_t>(padding)};
    auto* kernel = reinterpret_cast<void*>(context->saved_data["kernel"].toInt());
    if (n > 0) launch(kernel, grid, block, (block + block / 32) * sizeof(int), {gradient, ids, table}, numbers);
    return {table, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

extern "C" {

// Finds the kernel `name` in `source`, which is compiled once, for the life of the process.
char* pt_kernel_find(const char* source, const char* name, void** out) {
  return guarded([&] {
    // CUDA 12 does not have it in all its versions, and graphs need none of this.
    auto* get = reinterpret_cast<decltype(&cudaLibraryGetKernel)>(dlsym(RTLD_DEFAULT, "cudaLibraryGetKernel"));
    TORCH_CHECK(get, "this CUDA runtime loads no kernels");
    static std::mutex mutex;
    static std::map<std::string, cudaLibrary_t> libraries;
    std::lock_guard<std::mutex> lock(mutex);
    auto found = libraries.find(source);
    if (found == libraries.end()) found = libraries.emplace(source, loaded(compiled(source))).first;
    cudaKernel_t kernel;
    C10_CUDA_CHECK(get(&kernel, found->second, name));
    *out = kernel;
  });
}

// `tensors` come first among a kernel's arguments, as pointers to their memory, and `numbers` after them, as int.
char* pt_kernel_launch(
    void* kernel, const uint32_t grid[2], const uint32_t block[2], uint32_t shared, size_t n, const Handle* tensors, size_t m,
    const int32_t* numbers) {
  return guarded([&] {
    launch(
        kernel, {grid[0], grid[1]}, {block[0], block[1]}, shared, list(tensors, n), std::vector<int32_t>(numbers, numbers + m));
  });
}

// torch.embedding(table, ids) without a gradient for row `padding`; `kernel` is that of embedding.cu.
char* pt_embedding(void* kernel, Handle table, Handle ids, int64_t padding, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    TORCH_CHECK(ids->scalar_type() == at::kLong, "ids are 64-bit integers");
    c10::AutoGradMode as_before(grad_mode);
    *out = new at::Tensor(LookUp::apply(*table, *ids, padding, reinterpret_cast<int64_t>(kernel)));
  });
}

// The most bytes of the current device that libtorch held at once.
char* pt_peak_memory(int64_t* out) {
  return guarded([&] {
    auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(c10::cuda::current_device());
    *out = stats.reserved_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  });
}

}  // extern "C"
