// Convolution over the bytes of words with ReLU and max pooling: byte_convolution.cpp on a GPU, where libtorch would sort
// the bytes to add up the gradients of their embeddings.
//
// N words of at most L bytes, 0 beyond their end; V values of a byte, K offsets, F filters: table [V, K, F], float32. Sums
// have a fixed order.

// One block per word and 128 filters. y [N, F]: the largest max(0, bias + sum over k of table[word[t + k - K / 2], k]) over
// positions t. seen [K, N, F]: the bytes that the first largest value comes from; -1 for none.
extern "C" __global__ void byte_convolution(
    const float* table, const float* bias, const long long* bytes, float* y, short* seen, int n, int longest, int offsets, int filters) {
  extern __shared__ int shared[];
  int* word = shared;
  const int i = blockIdx.x, f = blockIdx.y * blockDim.x + threadIdx.x;
  for (int t = threadIdx.x; t < longest; t += blockDim.x) word[t] = bytes[(size_t)i * longest + t];
  __syncthreads();
  if (f >= filters) return;
  int length = 0, at = -1;
  while (length < longest && word[length] > 0) length++;
  float most = 0;
  for (int t = 0; t < length; t++) {
    float sum = bias[f];
    for (int k = 0; k < offsets; k++) {
      const int from = t + k - offsets / 2;
      if (from >= 0 && from < length) sum += table[(word[from] * offsets + k) * filters + f];
    }
    // NaN wins over all numbers.
    if (!(sum <= most) && most == most) most = sum, at = t;
  }
  y[(size_t)i * filters + f] = most;
  for (int k = 0; k < offsets; k++) {
    const int from = at + k - offsets / 2;
    seen[((size_t)k * n + i) * filters + f] = at >= 0 && from >= 0 && from < length ? word[from] : -1;
  }
}

// The gradient of the table from that of y: parts [S, V, K, F]. One block of 32 threads for n_rows words, one offset and 32
// filters, with a sum for each value and filter.
extern "C" __global__ void byte_gradients(
    const float* to_y, const short* seen, float* parts, int n, int n_rows, int values, int offsets, int filters) {
  extern __shared__ int shared[];
  const int k = blockIdx.y % offsets, f = blockIdx.y / offsets * 32 + threadIdx.x, end = min(n, ((int)blockIdx.x + 1) * n_rows);
  float* own = (float*)shared + threadIdx.x;
  for (int v = 0; v < values; v++) own[v * 32] = 0;
  if (f >= filters) return;
#pragma unroll 8
  for (int i = blockIdx.x * n_rows; i < end; i++) {
    const int value = seen[((size_t)k * n + i) * filters + f];
    if (value >= 0) own[value * 32] += to_y[(size_t)i * filters + f];
  }
  for (int v = 0; v < values; v++) parts[(((size_t)blockIdx.x * values + v) * offsets + k) * filters + f] = own[v * 32];
}

// out [size]: the sums of parts [S, size].
extern "C" __global__ void byte_sum(const float* parts, float* out, int n_parts, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < n_parts; s++) sum += parts[(size_t)s * size + i];
  out[i] = sum;
}
