// Custom kernels: CUDA source, compiled at run time by the NVRTC that comes with libtorch.
#include "guarded.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
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

void launch(
    void* kernel, dim3 grid, dim3 block, uint32_t shared, const std::vector<at::Tensor>& tensors, const std::vector<int32_t>& numbers,
    const void* listed = nullptr) {
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

// States [B, T, F] as they lie in memory: positions first, [T, B, F], or sentences first, [B, T, F].
struct States {
  at::Tensor memory;
  bool positions_first;
  int64_t rows, width, features;

  explicit States(const at::Tensor& x) : rows(x.size(0)), width(x.size(1)), features(x.size(2)) {
    memory = x.transpose(0, 1);
    positions_first = memory.is_contiguous();
    if (!positions_first) memory = x.contiguous();
  }

  at::Tensor of(const at::Tensor& other) const { return positions_first ? other.transpose(0, 1) : other; }
  int32_t by_row() const { return static_cast<int32_t>(positions_first ? features : width * features); }
  int32_t by_position() const { return static_cast<int32_t>(positions_first ? rows * features : features); }
};

// Max pooling over the positions of each sentence, by the kernels of max_pool.cu.
struct MaxPool : torch::autograd::Function<MaxPool> {
  static constexpr uint32_t BLOCK = 128;

  static dim3 grid(const States& states) { return {static_cast<uint32_t>(states.rows), static_cast<uint32_t>((states.features + BLOCK - 1) / BLOCK)}; }

  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& lengths, int64_t kernel, int64_t gradient_kernel) {
    States states(x);
    auto most = at::empty({states.rows, states.features}, x.options()), counts = at::empty_like(most);
    auto features = static_cast<int32_t>(states.features);
    launch(
        reinterpret_cast<void*>(kernel), grid(states), BLOCK, 0, {states.memory, lengths, most, counts},
        {features, states.by_row(), states.by_position()});
    context->save_for_backward({x, lengths, most, counts});
    context->saved_data["kernel"] = gradient_kernel;
    return most;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    auto saved = context->get_saved_variables();
    States states(saved[0]);
    auto to_x = at::empty_like(states.memory);
    auto features = static_cast<int32_t>(states.features), width = static_cast<int32_t>(states.width);
    launch(
        reinterpret_cast<void*>(context->saved_data["kernel"].toInt()), grid(states), BLOCK, 0,
        {states.memory, saved[1], saved[2], saved[3], gradients[0].contiguous(), to_x},
        {width, features, states.by_row(), states.by_position()});
    return {states.of(to_x), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

int32_t number(int64_t value) { return static_cast<int32_t>(value); }

// The convolution of byte_convolution.cu.
struct ByteConvolution : torch::autograd::Function<ByteConvolution> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& table, const at::Tensor& bias, const at::Tensor& bytes,
      const std::vector<int64_t>& kernels) {
    auto n = bytes.size(0), longest = bytes.size(1), offsets = table.size(1), filters = table.size(2);
    auto y = at::empty({n, filters}, table.options());
    auto seen = at::empty({offsets, n, filters}, table.options().dtype(at::kShort));
    constexpr uint32_t BLOCK = 128;
    launch(
        reinterpret_cast<void*>(kernels[0]), {static_cast<uint32_t>(n), static_cast<uint32_t>((filters + BLOCK - 1) / BLOCK)}, BLOCK,
        static_cast<uint32_t>(longest * sizeof(int32_t)), {table, bias, bytes, y, seen},
        {number(n), number(longest), number(offsets), number(filters)});
    context->save_for_backward({seen});
    context->saved_data["kernels"] = kernels, context->saved_data["values"] = table.size(0);
    return y;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& given) {
    auto seen = context->get_saved_variables()[0];
    auto kernels = context->saved_data["kernels"].toIntVector();
    auto to_y = given[0].contiguous();
    auto offsets = seen.size(0), n = seen.size(1), filters = seen.size(2), values = context->saved_data["values"].toInt();
    auto n_rows = std::max<int64_t>(64, (n + 63) / 64), n_parts = (n + n_rows - 1) / n_rows;
    auto parts = at::empty({n_parts, values, offsets, filters}, to_y.options());
    launch(
        reinterpret_cast<void*>(kernels[1]), {static_cast<uint32_t>(n_parts), static_cast<uint32_t>(offsets * ((filters + 31) / 32))}, 32,
        static_cast<uint32_t>(values * 32 * sizeof(float)), {to_y, seen, parts},
        {number(n), number(n_rows), number(values), number(offsets), number(filters)});
    auto to_table = parts[0];
    if (n_parts > 1) {
      to_table = at::empty_like(to_table);
      auto size = to_table.numel();
      launch(
          reinterpret_cast<void*>(kernels[2]), static_cast<uint32_t>((size + 127) / 128), 128, 0, {parts, to_table},
          {number(n_parts), number(size)});
    }
    // Whatever a filter reads, it reads a byte at the offset in the middle.
    return {to_table, to_table.select(1, offsets / 2).sum(0), at::Tensor(), at::Tensor()};
  }
};

// Dropout by the kernel of random.cu, which draws the same mask for the gradients.
struct Dropout : torch::autograd::Function<Dropout> {
  // `numbers` are the kernel's last ones, from first_row on; the last tells whether positions share their draws.
  static at::Tensor applied(const at::Tensor& x, const at::Tensor& seed, int64_t kernel, const std::vector<int64_t>& numbers) {
    States states(x);
    auto y = at::empty_like(states.memory);
    std::vector<int32_t> all{number(states.rows), number(states.width), number(states.features), states.by_row(), states.by_position()};
    for (auto value : numbers) all.push_back(number(value));
    auto draws = numbers.back() ? states.width * ((states.features + 3) / 4) : (states.width * states.features + 3) / 4;
    constexpr uint32_t BLOCK = 128;
    launch(
        reinterpret_cast<void*>(kernel), static_cast<uint32_t>((states.rows * draws + BLOCK - 1) / BLOCK), BLOCK, 0,
        {states.memory, seed, y}, all);
    return states.of(y);
  }

  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& seed, int64_t kernel,
      const std::vector<int64_t>& numbers) {
    context->save_for_backward({seed});
    context->saved_data["kernel"] = kernel, context->saved_data["numbers"] = numbers;
    return applied(x, seed, kernel, numbers);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    auto to_x = applied(
        gradients[0], context->get_saved_variables()[0], context->saved_data["kernel"].toInt(),
        context->saved_data["numbers"].toIntVector());
    return {to_x, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// A linear layer whose gradients come from the kernels of linear.cu.
struct NarrowLinear : torch::autograd::Function<NarrowLinear> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t gradients,
      int64_t sum) {
    context->save_for_backward({x, weight});
    context->saved_data["gradients"] = gradients, context->saved_data["sum"] = sum;
    return at::linear(x, weight, bias);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& given) {
    auto saved = context->get_saved_variables();
    auto &x = saved[0], &weight = saved[1];
    auto to_y = given[0].contiguous();
    torch::autograd::variable_list all(5);
    if (context->needs_input_grad(0)) all[0] = at::mm(to_y, weight);
    if (!context->needs_input_grad(1) && !context->needs_input_grad(2)) return all;
    auto kernel = [&](const char* name) { return reinterpret_cast<void*>(context->saved_data[name].toInt()); };
    auto n = x.size(0), width = x.size(1), n_outputs = weight.size(0);
    // At most 64 blocks of rows, each a multiple of 32.
    auto n_rows = std::max<int64_t>(32, (n + 64 * 32 - 1) / (64 * 32) * 32), n_parts = (n + n_rows - 1) / n_rows;
    auto parts = at::empty({n_parts > 1 ? n_parts : 0, n_outputs, width + 1}, x.options());
    all[1] = at::empty({n_outputs, width}, x.options()), all[2] = at::empty({n_outputs}, x.options());
    dim3 grid(static_cast<uint32_t>(n_parts), static_cast<uint32_t>((width + 64) / 64));
    launch(
        kernel("gradients"), grid, 256, static_cast<uint32_t>(32 * (64 + n_outputs) * sizeof(float)),
        {x, to_y, parts, all[1], all[2]}, {number(n), number(width), number(n_outputs), number(n_rows)});
    if (n_parts > 1) {
      dim3 threads(static_cast<uint32_t>((n_outputs * (width + 1) + 127) / 128));
      launch(kernel("sum"), threads, 128, 0, {parts, all[1], all[2]}, {number(n_parts), number(width), number(n_outputs)});
    }
    return all;
  }
};

}  // namespace

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

// Max pooling over the positions of each sentence of x [B, T, F], float32, within lengths [B], none of them 0, by the
// kernels of max_pool.cu.
char* pt_max_pool(void* kernel, void* gradient_kernel, Handle x, Handle lengths, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    *out = new at::Tensor(
        MaxPool::apply(*x, *lengths, reinterpret_cast<int64_t>(kernel), reinterpret_cast<int64_t>(gradient_kernel)));
  });
}

// The convolution of byte_convolution.cu, by its three kernels in their order: table [V, K, F], bias [F], bytes [N, L] to
// [N, F].
char* pt_byte_convolution_cuda(void* const kernels[3], Handle table, Handle bias, Handle bytes, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    std::vector<int64_t> all;
    for (int i = 0; i < 3; i++) all.push_back(reinterpret_cast<int64_t>(kernels[i]));
    *out = new at::Tensor(ByteConvolution::apply(*table, *bias, *bytes, all));
  });
}

// Dropout of x [B, T, F], float32, by the kernel of random.cu; `numbers` are its arguments from first_row on.
char* pt_dropout(void* kernel, Handle x, Handle seed, size_t n, const int64_t* numbers, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    *out = new at::Tensor(
        Dropout::apply(*x, *seed, reinterpret_cast<int64_t>(kernel), std::vector<int64_t>(numbers, numbers + n)));
  });
}

// x [N, F] W^T + b for at most 128 outputs, float32, contiguous; its gradients by the kernels of linear.cu.
char* pt_narrow_linear(void* gradients, void* sum, Handle x, Handle weight, Handle bias, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    *out = new at::Tensor(
        NarrowLinear::apply(*x, *weight, *bias, reinterpret_cast<int64_t>(gradients), reinterpret_cast<int64_t>(sum)));
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
