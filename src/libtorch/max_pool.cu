// Max pooling over the positions of each sentence, and its gradient, which tied states share evenly.
//
// x and to_x: B sentences of F features; sentences are `by_row` numbers apart, positions `by_position`. lengths [B];
// most, counts (of tied states) and the gradient [B, F]. One block per sentence and group of features.

extern "C" __global__ void max_pool(
    const float* x, const long long* lengths, float* most, float* counts, int features, int by_row, int by_position) {
  const int f = blockIdx.y * blockDim.x + threadIdx.x;
  if (f >= features) return;
  x += (size_t)blockIdx.x * by_row + f;
  const int length = lengths[blockIdx.x];
  float largest = x[0];
  int count = 1;
#pragma unroll 4
  for (int t = 1; t < length; t++) {
    const float value = x[(size_t)t * by_position];
    // NaN wins over all numbers.
    if (value > largest || value != value) largest = value, count = 1;
    else count += value == largest;
  }
  most[blockIdx.x * features + f] = largest, counts[blockIdx.x * features + f] = count;
}

// `width` is the number of positions, padding included.
extern "C" __global__ void max_pool_gradient(
    const float* x, const long long* lengths, const float* most, const float* counts, const float* gradient, float* to_x, int width,
    int features, int by_row, int by_position) {
  const int f = blockIdx.y * blockDim.x + threadIdx.x;
  if (f >= features) return;
  const size_t start = (size_t)blockIdx.x * by_row + f, own = blockIdx.x * features + f;
  const int length = lengths[blockIdx.x];
  const float largest = most[own], share = gradient[own] / counts[own];
#pragma unroll 4
  for (int t = 0; t < width; t++) {
    const size_t at = start + (size_t)t * by_position;
    to_x[at] = t < length && x[at] == largest ? share : 0;
  }
}
