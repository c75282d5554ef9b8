// GradNorm's and uncertainty's updates of src/weighting, on one thread each; operators need two dozen launches. And the
// norms that GradNorm needs.
//
// T tasks; vectors are [T] float64. `present` is 1 or 0. `rule`: learning rate, betas and epsilon of the weights'
// optimizer: Adam, whose moments and steps are updated, or SGD.

// The larger of two numbers; NaN stays NaN.
__device__ double at_least(double x, double least) { return x < least ? least : x; }

// The optimizer's step from `value` against its gradient.
__device__ double descended(double value, double gradient, const double* rule, double* first, double* second, double* steps, int i, int adam) {
  const double rate = rule[0], beta1 = rule[1], beta2 = rule[2], epsilon = rule[3];
  if (!adam) return value - gradient * rate;
  steps[i] += 1;
  first[i] = first[i] * beta1 + gradient * (1 - beta1);
  second[i] = second[i] * beta2 + gradient * gradient * (1 - beta2);
  const double momentum = first[i] / (1 - pow(beta1, steps[i])), spread = second[i] / (1 - pow(beta2, steps[i]));
  return value - momentum / (sqrt(spread) + epsilon) * rate;
}

// `given`: alpha, the smallest weight, the smallest initial loss. seen [3, T]: norms, training rates and targets.
extern "C" __global__ void gradnorm(
    const double* losses, const double* norms, const double* initial, const double* given, const double* priorities, const double* present,
    double* weights, double* floored, double* seen, const double* rule, double* first, double* second, double* steps, int n, int adam) {
  const double alpha = given[0], floor = given[1], smallest_loss = given[2];
  double magnitudes = 0, shares = 0, ratios = 0, count = 0, before = 0, after = 0;
  for (int i = 0; i < n; i++) {
    double priority = priorities[i] * present[i];
    magnitudes += weights[i] * norms[i] * priority;
    shares += priority;
    ratios += at_least(losses[i], 0) / at_least(initial[i], smallest_loss) * present[i];
    count += present[i];
    before += weights[i] * present[i];
  }
  const double unknown = __longlong_as_double(0x7ff8000000000000);
  for (int i = 0; i < 3 * n; i++) seen[i] = unknown;
  // Where something is not finite, no weight changes.
  if (magnitudes * 0 != 0) return;
  const double mean = magnitudes / shares, mean_ratio = at_least(ratios / count, 2.2250738585072014e-308);
  for (int i = 0; i < n; i++) {
    if (present[i] == 0) continue;
    double slope = norms[i] * priorities[i];
    double training_rate = at_least(losses[i], 0) / at_least(initial[i], smallest_loss) / mean_ratio;
    double target = priorities[i] * mean * pow(training_rate, alpha);
    double off = weights[i] * slope - target;
    double gradient = off > 0 ? slope : off < 0 ? -slope : 0;
    double value = descended(weights[i], gradient, rule, first, second, steps, i, adam);
    *floored += value < floor;
    weights[i] = at_least(value, floor);
    after += weights[i];
    seen[i] = norms[i], seen[n + i] = training_rate, seen[2 * n + i] = target;
  }
  for (int i = 0; i < n; i++) {
    if (present[i] > 0) weights[i] *= before / after;
  }
}

// Updates s = log sigma^2 and the weights exp(-s).
extern "C" __global__ void uncertainty(
    const double* losses, const double* present, double* s, double* weights, const double* rule, double* first, double* second,
    double* steps, int n, int adam) {
  double all = 0;
  for (int i = 0; i < n; i++) all += 0.5 - weights[i] * losses[i];
  // Where something is not finite, nothing changes.
  if (all * 0 != 0) return;
  for (int i = 0; i < n; i++) {
    if (present[i] == 0) continue;
    s[i] = descended(s[i], 0.5 - weights[i] * losses[i], rule, first, second, steps, i, adam);
    weights[i] = exp(-s[i]);
  }
}

// Values that change from launch to launch.
struct Listed {
  long long at[256];
};

// For src/train/taps.rs: partial sums of squares of float32 tensors, in a fixed order: parts [tensors, P], one per
// block. `tensors` has address and size of each tensor, in pairs. The block size is a power of two.
extern "C" __global__ void squares_of(double* parts, Listed tensors) {
  extern __shared__ double shared[];
  const float* x = (const float*)tensors.at[2 * blockIdx.y];
  const long long n = tensors.at[2 * blockIdx.y + 1], by = (long long)gridDim.x * blockDim.x;
  float sum = 0;
#pragma unroll 4
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += by) sum += x[i] * x[i];
  shared[threadIdx.x] = sum;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) parts[blockIdx.y * gridDim.x + blockIdx.x] = shared[0];
}

// squares [T]: for each task, the sum of the parts [K, P] of its tensors, divided by its squared weight; 0 if it has
// none. `tasks` has the task of each of the K tensors. One block, one thread per task.
extern "C" __global__ void squares_by_task(
    const double* parts, const float* weights, double* squares, int n_tasks, int n_tensors, int n_parts, Listed tasks) {
  const int task = threadIdx.x;
  if (task >= n_tasks) return;
  double sum = 0;
  for (int k = 0; k < n_tensors; k++) {
    if (tasks.at[k] != task) continue;
#pragma unroll 16
    for (int p = 0; p < n_parts; p++) sum += parts[k * n_parts + p];
  }
  squares[task] = sum / ((double)weights[task] * weights[task]);
}
