// The cross-entropy of src/model/heads/cross_entropy.rs and its gradient, in two launches.
//
// N rows of C logits; float32, sums in float64 and in a fixed order.

// One block per row, whose size is a power of two: x and the gradient to_x [N, C], labels and losses [N]; rows labelled -1 do not count. `smoothing`
// has the bits of a float.
extern "C" __global__ void cross_entropy_rows(
    const float* x, const long long* labels, float* to_x, float* losses, int n_classes, int n_decisions, int smoothing) {
  extern __shared__ double shared[];
  const int i = threadIdx.x, by = blockDim.x;
  const long long label = labels[blockIdx.x];
  x += (size_t)blockIdx.x * n_classes, to_x += (size_t)blockIdx.x * n_classes;
  if (label < 0) {
    for (int c = i; c < n_classes; c += by) to_x[c] = 0;
    if (i == 0) losses[blockIdx.x] = 0;
    return;
  }
  float most = x[0];
  for (int c = i; c < n_classes; c += by) most = fmaxf(most, x[c]);
  shared[i] = most;
  for (int half = by / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) shared[i] = fmax(shared[i], shared[i + half]);
  }
  __syncthreads();
  most = shared[0];
  __syncthreads();
  double sum = 0, all = 0;
  for (int c = i; c < n_classes; c += by) sum += expf(x[c] - most), all += x[c] - most;
  shared[i] = sum, shared[by + i] = all;
  for (int half = by / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) shared[i] += shared[i + half], shared[by + i] += shared[by + i + half];
  }
  __syncthreads();
  sum = shared[0], all = shared[by];
  const float spread = __int_as_float(smoothing), log_sum = logf((float)sum);
  for (int c = i; c < n_classes; c += by) {
    float target = (c == label ? 1 - spread : 0) + spread / n_classes;
    to_x[c] = (expf(x[c] - most - log_sum) - target) / n_decisions;
  }
  if (i == 0) {
    float expected = (1 - spread) * (x[label] - most);
    if (spread > 0) expected += spread * (float)(all / n_classes);
    losses[blockIdx.x] = log_sum - expected;
  }
}

// One block, whose size is a power of two: the sum of losses [N] divided by the number of decisions.
extern "C" __global__ void cross_entropy_sum(const float* losses, float* loss, int n_rows, int n_decisions) {
  extern __shared__ double shared[];
  const int i = threadIdx.x;
  double sum = 0;
  for (int n = i; n < n_rows; n += blockDim.x) sum += losses[n];
  shared[i] = sum;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) shared[i] += shared[i + half];
  }
  if (i == 0) *loss = shared[0] / n_decisions;
}
