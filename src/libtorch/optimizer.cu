// The updates of src/optim on a GPU, and the sums of gradients that they need.
//
// Parameters are cut into pieces, one block of threads each. Tables of which a step reads some rows are updated by row,
// as in src/optim/deferred.rs on the CPU: other rows wait for their updates, which depend only on each step's rates.
//
// V rows of E numbers; N places (tokens) of a step. An id may occur more than once: its first place represents it.

#ifdef __CUDACC__
__device__ float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

// The numbers of one step that the update of a row needs.
struct Step {
  // Factor of the weights, factor of the weights in the gradient; rate / (1 - beta_1^t), 1 / sqrt(1 - beta_2^t).
  float keep, l2, size, spread;
  // Factor of the weights in their average; whether the table moves; whether to check for negligible updates. The last
  // pads to eight.
  float share, moves, looks, rest;
};

// The optimizer: Adam (1) or SGD (0), whose momentum is beta1; whether the decay is decoupled.
struct Rule {
  double adam, decoupled, beta1, beta2, epsilon, decay;
};

// Updates below this fraction of the learning rate are negligible: their first moment is set to 0.
#define NOTHING 1e-7f
#define LOOK_EVERY 16

__device__ Step step_of(const Rule& rule, double rate, float share, double t) {
  Step step = {1, 0, (float)rate, 1, share, 1, 0, 0};
  if (rule.adam > 0) {
    step.size = rate / (1 - pow(rule.beta1, t));
    step.spread = 1 / sqrt(1 - pow(rule.beta2, t));
    step.looks = (long long)t % LOOK_EVERY == 0;
  }
  if (rule.decoupled > 0) step.keep = 1 - rate * rule.decay;
  else step.l2 = rule.decay;
  return step;
}

// first [V] and count [V]: the first place of each id and its number of places.
extern "C" __global__ void mark_rows(const long long* ids, int* first, int* count, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicMin(first + ids[i], i);
  atomicAdd(count + ids[i], 1);
}

// The sum over the threads of a block, in a fixed order; `shared` holds one number per thread.
__device__ void add_up(float own, float* sum, float* shared) {
  __syncthreads();
  shared[threadIdx.x] = own;
  __syncthreads();
  // Sixteen partial sums, then their sum, so that no thread adds up the whole block.
  if (threadIdx.x < 16)
    for (int i = threadIdx.x + 16; i < blockDim.x; i += 16) own += shared[i];
  __syncthreads();
  if (threadIdx.x < 16) shared[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < 16; i++) own += shared[i];
  *sum = own;
}

// Sums gradients [N, E] by id. sums [N, E]: at the first place of an id, the sum over all its places, in their order; 0
// at the others, and for the id `skipped`. squares [N]: the sum of squares of each row of sums. One block per place.
extern "C" __global__ void sum_rows(
    const float* gradients, const long long* ids, const int* first, const int* count, float* sums, float* squares, int n, int width,
    int skipped) {
  extern __shared__ int shared[];
  int *places = shared, *counts = shared + 2 * blockDim.x;
  const int place = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long id = ids[place];
  float* own = sums + (size_t)place * width;
  if (id == skipped || first[id] != place) {
    for (int e = threadIdx.x; e < width; e += blockDim.x) own[e] = 0;
    if (threadIdx.x == 0) squares[place] = 0;
    return;
  }
  for (int e = threadIdx.x; e < width; e += blockDim.x) own[e] = gradients[(size_t)place * width + e];
  // Places are collected until the list may be too short for the next chunk's, so that many rows are read at a time.
  int left = count[id] - 1, held = 0;
  for (int chunk = place + 1; left > 0 && chunk < n; chunk += blockDim.x) {
    int i = chunk + threadIdx.x;
    unsigned here = __ballot_sync(0xffffffff, i < n && ids[i] == id);
    if (lane == 0) counts[warp] = __popc(here);
    __syncthreads();
    int at = __popc(here & ((1u << lane) - 1)), found = 0;
    for (int w = 0; w < blockDim.x / 32; w++) {
      if (w < warp) at += counts[w];
      found += counts[w];
    }
    if (here >> lane & 1) places[held + at] = i;
    held += found, left -= found;
    __syncthreads();
    if (left > 0 && held <= blockDim.x) continue;
    for (int e = threadIdx.x; e < width; e += blockDim.x) {
      float sum = own[e];
#pragma unroll 16
      for (int k = 0; k < held; k++) sum += gradients[(size_t)places[k] * width + e];
      own[e] = sum;
    }
    held = 0;
    __syncthreads();
  }
  float square = 0;
  for (int e = threadIdx.x; e < width; e += blockDim.x) square += own[e] * own[e];
  add_up(square, squares + place, (float*)shared);
}

// Appends a step to the `now` entries of `steps`, on one thread. `table_steps` counts those in which the table moved.
extern "C" __global__ void note_step(
    const double* rule, const float* rate, const float* share, const float* skip, float* table_steps, float* steps, int* now,
    int moves) {
  const bool moved = moves && *skip == 0;
  const Step still = {1, 0, 0, 1, *share, 0, 0, 0};
  ((Step*)steps)[(*now)++] = moved ? step_of(*(const Rule*)rule, *rate, *share, *table_steps += 1) : still;
}

// One element of a row. Operations are intrinsics, so that the compiler cannot fuse some here and others there: how
// long steps wait changes no bit.
struct Number {
  float weight, first, second, average;
};

// Accurate to two units in the last place.
__device__ float root(float x) { return x > 0 ? __fmul_rn(x, rsqrtf(x)) : 0; }

__device__ void take(Number& x, const Step& step, const Rule& rule, float given, bool touched) {
  if (step.moves > 0) {
    const float gradient = __fmaf_rn(step.l2, x.weight, given);
    const float beta1 = rule.beta1, beta2 = rule.beta2, epsilon = rule.epsilon;
    if (rule.adam == 0) {
      x.first = __fmaf_rn(beta1, x.first, gradient);
      x.weight = __fmaf_rn(-step.size, x.first, x.weight);
    } else if (x.first == 0 && gradient == 0) {
      x.second = __fmul_rn(beta2, x.second);
      x.weight = __fmul_rn(step.keep, x.weight);
    } else {
      const float rest1 = 1 - rule.beta1, rest2 = 1 - rule.beta2;
      x.first = __fmaf_rn(beta1, x.first, __fmul_rn(rest1, gradient));
      x.second = __fmaf_rn(beta2, x.second, __fmul_rn(__fmul_rn(rest2, gradient), gradient));
      const float update = __fdividef(x.first, __fmaf_rn(step.spread, root(x.second), epsilon));
      x.weight = __fmaf_rn(-step.size, update, __fmul_rn(step.keep, x.weight));
      if (step.looks > 0 && step.l2 == 0 && !touched && fabsf(update) < NOTHING) x.first = 0;
    }
  }
  x.average = __fmaf_rn(step.share, __fsub_rn(x.weight, x.average), x.average);
}

// Applies steps `from` to `to` - 1 to row `row`, with the gradient `given` if it is not null; one block.
__device__ void advance_row(
    float* weights, float* firsts, float* seconds, float* averages, const double* rule_numbers, const float* steps, long long row,
    int from, int to, int width, const float* given, float divisor, bool averaged, Step* shared) {
  const Rule rule = *(const Rule*)rule_numbers;
  for (int i = threadIdx.x; i < (to - from) * (int)(sizeof(Step) / sizeof(float)); i += blockDim.x)
    ((float*)shared)[i] = ((const float*)(steps))[from * (sizeof(Step) / sizeof(float)) + i];
  __syncthreads();
  for (int e = threadIdx.x; e < width; e += blockDim.x) {
    const size_t at = row * width + e;
    Number x = {weights[at], firsts[at], rule.adam > 0 ? seconds[at] : 0, averaged ? averages[at] : 0};
    const float gradient = given ? __fdiv_rn(given[e], divisor) : 0;
    for (int i = 0; i < to - from; i++) take(x, shared[i], rule, gradient, given);
    weights[at] = x.weight, firsts[at] = x.first;
    if (rule.adam > 0) seconds[at] = x.second;
    if (averaged) averages[at] = x.average;
  }
}

// Applies the steps that the rows of `ids` have not taken: those from `taken` [V] to `now`. If `touched`, that is the
// one step of `gradients` [N, E], which are `divisor` times too large. One block per place. If `last`, first and count
// are reset for the next step.
extern "C" __global__ void step_rows(
    const long long* ids, int* first, int* count, float* weights, float* firsts, float* seconds, float* averages, int* taken,
    const double* rule, const float* steps, const int* now, const float* gradients, const float* divisor, int width, int averaged,
    int touched, int last) {
  extern __shared__ int shared[];
  const int place = blockIdx.x;
  const long long id = ids[place];
  if (first[id] != place) return;
  const int from = taken[id], to = *now;
  const float* given = touched ? gradients + (size_t)place * width : nullptr;
  if (from < to) {
    advance_row(
        weights, firsts, seconds, averages, rule, steps, id, from, to, width, given, touched ? *divisor : 1, averaged, (Step*)shared);
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  taken[id] = to;
  if (last) first[id] = 0x7fffffff, count[id] = 0;
}

// Applies the steps that any row has not taken, and resets `taken` to 0. One block per row.
extern "C" __global__ void settle_rows(
    float* weights, float* firsts, float* seconds, float* averages, int* taken, const double* rule, const float* steps, const int* now,
    int width, int averaged) {
  extern __shared__ int shared[];
  const int row = blockIdx.x, from = taken[row];
  if (from < *now) {
    advance_row(
        weights, firsts, seconds, averages, rule, steps, row, from, *now, width, nullptr, 1, averaged, (Step*)shared);
  }
  __syncthreads();
  if (threadIdx.x == 0) taken[row] = 0;
}

// Addresses, which change from step to step; null for none.
struct Listed {
  const void* at[256];
};

// A piece of a parameter: its gradient's place in the list, the first element there, the number of elements, then addresses.
// `average` is null if there is none, `half` if there is no 16-bit copy of the weights.
struct Piece {
  long long gradient, start, n;
  float *weights, *first, *second, *average;
  unsigned short* half;
  const float* steps;
  long long decays, bfloat;
};

__device__ float widened(unsigned short bits, bool bfloat) { return bfloat ? __int_as_float((int)bits << 16) : half_to_float(bits); }

__device__ unsigned short narrowed(float x, bool bfloat) {
  if (!bfloat) return float_to_half(x);
  unsigned bits = __float_as_int(x);
  // Rounds to nearest, ties to even; NaN stays NaN.
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// `halves`: whether gradients of parameters with 16-bit copies are in 16 bits.
__device__ float gradient_at(const Piece& piece, const void* gradient, int i, int halves) {
  return halves && piece.half ? widened(((const unsigned short*)gradient)[piece.start + i], piece.bfloat)
                              : ((const float*)gradient)[piece.start + i];
}

// The sum of squares of each piece's gradient.
extern "C" __global__ void squares(const long long* pieces, float* sums, int halves, Listed gradients) {
  extern __shared__ int shared[];
  const Piece piece = ((const Piece*)pieces)[blockIdx.x];
  const void* gradient = gradients.at[piece.gradient];
  float sum = 0;
  for (int i = threadIdx.x; i < piece.n && gradient; i += blockDim.x) {
    const float value = gradient_at(piece, gradient, i, halves);
    sum += value * value;
  }
  add_up(sum, sums + blockIdx.x, (float*)shared);
}

// Updates all pieces whose parameter has a gradient, `divisor` times too large, unless `skip` is 1; the averages take
// in the weights in any case. The parameters' `steps` count this one already.
extern "C" __global__ void update(
    const long long* pieces, const double* rule_numbers, const float* rate, const float* share, const float* skip, const float* divisor,
    int halves, Listed gradients) {
  extern __shared__ int shared[];
  Step* step = (Step*)shared;
  const Piece piece = ((const Piece*)pieces)[blockIdx.x];
  const void* gradient = gradients.at[piece.gradient];
  const bool moves = gradient && *skip == 0;
  Rule rule = *(const Rule*)rule_numbers;
  if (!piece.decays) rule.decay = 0;
  if (threadIdx.x == 0) {
    const Step still = {1, 0, 0, 1, *share, 0, 0, 0};
    *step = moves ? step_of(rule, *rate, *share, *piece.steps) : still;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < piece.n; i += blockDim.x) {
    Number x = {piece.weights[i], piece.first[i], rule.adam > 0 ? piece.second[i] : 0, piece.average ? piece.average[i] : 0};
    take(x, *step, rule, moves ? __fdiv_rn(gradient_at(piece, gradient, i, halves), *divisor) : 0, true);
    if (piece.average) piece.average[i] = x.average;
    if (!moves) continue;
    piece.weights[i] = x.weight, piece.first[i] = x.first;
    if (rule.adam > 0) piece.second[i] = x.second;
    if (piece.half) piece.half[i] = narrowed(x.weight, piece.bfloat);
  }
}
