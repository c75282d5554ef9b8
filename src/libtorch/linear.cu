// The gradients of a linear layer with few outputs, by its weights and bias: for these shapes cuBLAS takes several times as
// long, and waits for a memset.
//
// N rows, F inputs, C outputs: x [N, F], to_y [N, C] the gradients of the outputs, float32; sums in a fixed order. The bias
// counts as the weights of an input F that is 1.

#define WIDE 64
#define TALL 32
#define MOST 128

struct __align__(16) Four {
  float at[4];
};

// Block (s, w) sums rows [s * n_rows, (s + 1) * n_rows) for inputs [w * 64, (w + 1) * 64): parts [S, C, F + 1]. Its 256
// threads have four inputs and every sixteenth output each. With one s, to_weight [C, F] and to_bias [C] are written instead.
extern "C" __global__ void __launch_bounds__(256) linear_gradients(
    const float* x, const float* to_y, float* parts, float* to_weight, float* to_bias, int n, int width, int n_outputs, int n_rows) {
  extern __shared__ Four shared[];
  float *inputs = (float*)shared, *outputs = inputs + TALL * WIDE;
  const int four = threadIdx.x % 16, first = threadIdx.x / 16, from = blockIdx.y * WIDE;
  const int end = min(n, ((int)blockIdx.x + 1) * n_rows);
  float sums[MOST / 16][4];
#pragma unroll
  for (int k = 0; k < MOST / 16; k++) {
#pragma unroll
    for (int j = 0; j < 4; j++) sums[k][j] = 0;
  }
  for (int row = blockIdx.x * n_rows; row < end; row += TALL) {
    const int tall = min(TALL, end - row);
#pragma unroll 4
    for (int i = threadIdx.x; i < tall * WIDE; i += blockDim.x) {
      const int at = from + i % WIDE;
      inputs[i] = at < width ? x[(size_t)(row + i / WIDE) * width + at] : at == width;
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < tall * n_outputs; i += blockDim.x) outputs[i] = to_y[(size_t)row * n_outputs + i];
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < tall; r++) {
      const Four input = shared[r * (WIDE / 4) + four];
#pragma unroll
      for (int k = 0; k < MOST / 16; k++) {
        if (first + 16 * k >= n_outputs) break;
        const float output = outputs[r * n_outputs + first + 16 * k];
#pragma unroll
        for (int j = 0; j < 4; j++) sums[k][j] += input.at[j] * output;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < MOST / 16; k++) {
    const int c = first + 16 * k;
    if (c >= n_outputs) break;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int at = from + four * 4 + j;
      if (at > width) break;
      if (gridDim.x > 1) parts[((size_t)blockIdx.x * n_outputs + c) * (width + 1) + at] = sums[k][j];
      else if (at < width) to_weight[(size_t)c * width + at] = sums[k][j];
      else to_bias[c] = sums[k][j];
    }
  }
}

// The sums of `parts`, one thread per weight.
extern "C" __global__ void linear_sum(const float* parts, float* to_weight, float* to_bias, int n_parts, int width, int n_outputs) {
  const int size = n_outputs * (width + 1), i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 16
  for (int s = 0; s < n_parts; s++) sum += parts[(size_t)s * size + i];
  const int c = i / (width + 1), at = i % (width + 1);
  if (at < width) to_weight[(size_t)c * width + at] = sum;
  else to_bias[c] = sum;
}
