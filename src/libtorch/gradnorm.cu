// GradNorm's update of src/weighting/gradnorm.rs, on one thread; operators need two dozen launches.
//
// All float64. [T]: losses, norms, initial, weights, moved (the new weights), Adam's moments and steps. seen [3, T]:
// norms, training rates and targets. `given`: the numbers read below, then priorities and presence (1 or 0), [T] each.

// The larger of two numbers; NaN stays NaN.
__device__ double at_least(double x, double least) { return x < least ? least : x; }

extern "C" __global__ void gradnorm(
    const double* losses, const double* norms, const double* initial, const double* given, const double* weights, double* moved,
    double* first, double* second, double* steps, double* floored, double* seen, int n, int adam) {
  const double alpha = given[0], floor = given[1], smallest_loss = given[2];
  const double rate = given[3], beta1 = given[4], beta2 = given[5], epsilon = given[6];
  const double *priorities = given + 7, *here = priorities + n;
  double magnitudes = 0, shares = 0, ratios = 0, count = 0;
  for (int i = 0; i < n; i++) {
    double priority = priorities[i] * here[i];
    magnitudes += weights[i] * norms[i] * priority;
    shares += priority;
    ratios += at_least(losses[i], 0) / at_least(initial[i], smallest_loss) * here[i];
    count += here[i];
  }
  const double unknown = __longlong_as_double(0x7ff8000000000000);
  if (magnitudes * 0 != 0) {
    // Where something is not finite, no weight changes.
    for (int i = 0; i < n; i++) moved[i] = weights[i], seen[i] = seen[n + i] = seen[2 * n + i] = unknown;
    return;
  }
  const double mean = magnitudes / shares, mean_ratio = at_least(ratios / count, 2.2250738585072014e-308);
  double before = 0, after = 0;
  for (int i = 0; i < n; i++) {
    double slope = norms[i] * priorities[i] * here[i];
    double training_rate = at_least(losses[i], 0) / at_least(initial[i], smallest_loss) * here[i] / mean_ratio;
    double target = priorities[i] * here[i] * mean * pow(training_rate, alpha);
    double off = weights[i] * slope - target;
    double gradient = off > 0 ? slope : off < 0 ? -slope : 0;
    double value = weights[i];
    if (here[i] > 0 && adam) {
      steps[i] += 1;
      first[i] = first[i] * beta1 + gradient * (1 - beta1);
      second[i] = second[i] * beta2 + gradient * gradient * (1 - beta2);
      double momentum = first[i] / (1 - pow(beta1, steps[i])), spread = second[i] / (1 - pow(beta2, steps[i]));
      value -= momentum / (sqrt(spread) + epsilon) * rate;
    } else if (here[i] > 0) {
      value -= gradient * rate;
    }
    *floored += value < floor;
    moved[i] = at_least(value, floor);
    before += weights[i] * here[i];
    after += moved[i] * here[i];
    seen[i] = here[i] > 0 ? norms[i] : unknown;
    seen[n + i] = here[i] > 0 ? training_rate : unknown;
    seen[2 * n + i] = here[i] > 0 ? target : unknown;
  }
  for (int i = 0; i < n; i++) moved[i] = here[i] > 0 ? moved[i] * (before / after) : weights[i];
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
    const double* parts, const double* weights, double* squares, int n_tasks, int n_tensors, int n_parts, Listed tasks) {
  const int task = threadIdx.x;
  if (task >= n_tasks) return;
  double sum = 0;
  for (int k = 0; k < n_tensors; k++) {
    if (tasks.at[k] != task) continue;
#pragma unroll 16
    for (int p = 0; p < n_parts; p++) sum += parts[k * n_parts + p];
  }
  squares[task] = sum / (weights[task] * weights[task]);
}
