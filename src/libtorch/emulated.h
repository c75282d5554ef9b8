// What the kernels of this folder use of CUDA, on the CPU: a CUDA thread is a thread; blocks run one after another.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__ static
#define __shared__
#define __launch_bounds__(threads)
#define __align__(bytes) alignas(bytes)

using std::min;

struct Place {
  unsigned x, y;
};
static thread_local Place threadIdx, blockIdx;
static Place blockDim, gridDim;
static std::unique_ptr<std::barrier<>> block_barrier;
static std::vector<unsigned char> votes;  // by thread of the block
// Kernels declare it as `shared`, each with a type of its own.
alignas(16) unsigned char block_memory[1 << 16] __asm__("shared");

static unsigned thread_number() { return threadIdx.y * blockDim.x + threadIdx.x; }
static void __syncthreads() { block_barrier->arrive_and_wait(); }

static unsigned votes_among(bool vote, unsigned first, unsigned n) {
  votes[thread_number()] = vote;
  __syncthreads();
  unsigned bits = 0;
  for (unsigned i = 0; i < n && first + i < votes.size(); i++) bits |= votes[first + i] << (i % 32);
  __syncthreads();
  return bits;
}

// Waits for the whole block, so all warps of a block must vote together.
static unsigned __ballot_sync(unsigned, bool vote) { return votes_among(vote, thread_number() / 32 * 32, 32); }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }

static int atomicMin(int* at, int value) {
  int before = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (value < before && !__atomic_compare_exchange_n(at, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

static int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fdividef(float a, float b) { return a / b; }
static float rsqrtf(float x) { return 1 / std::sqrt(x); }

static double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static float half_to_float(unsigned short bits) {
  int exponent = bits >> 10 & 31, digits = bits & 1023;
  float size = exponent == 31 ? (digits ? NAN : INFINITY) : std::ldexp(float(exponent ? digits + 1024 : digits), std::max(exponent, 1) - 25);
  return bits >> 15 ? -size : size;
}

static unsigned short float_to_half(float x) {
  unsigned short sign = std::signbit(x) << 15;
  float size = std::fabs(x);
  if (size != size) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  // Rounds to nearest, ties to even; a carry increments the exponent.
  return sign | (unsigned short)(std::nearbyint(std::ldexp(size, 10 - exponent)) + (exponent + 14) * 1024);
}

static float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void* const* arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A>
void emulate(void (*kernel)(A...), const uint32_t* grid, const uint32_t* block, void* const* arguments) {
  blockDim = {block[0], block[1]}, gridDim = {grid[0], grid[1]};
  auto n = block[0] * block[1];
  auto next_block = [n]() noexcept {
    // NaN everywhere, so that a kernel that reads memory before writing it fails its test.
    std::memset(block_memory, 0xff, sizeof block_memory);
    votes.assign(n, 0);
    block_barrier = std::make_unique<std::barrier<>>(n);
  };
  next_block();
  std::barrier everyone(n, next_block);
  auto thread = [&](unsigned number) {
    threadIdx = {number % block[0], number / block[0]};
    for (unsigned i = 0; i < grid[0] * grid[1]; i++) {
      blockIdx = {i % grid[0], i / grid[0]};
      call(kernel, arguments, std::index_sequence_for<A...>());
      block_barrier->arrive_and_drop();
      everyone.arrive_and_wait();
    }
  };
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < n; number++) threads.emplace_back(thread, number);
  for (auto& one : threads) one.join();
}
