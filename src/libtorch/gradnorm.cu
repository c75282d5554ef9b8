// GradNorm's update of src/weighting/gradnorm.rs, which operators take in two dozen launches: one thread, for some tasks.
//
// Float64 throughout. losses, norms, weights, moved, Adam's moments and steps, and initial [T]; seen [3, T]; `given` has the
// numbers below, then priorities and presence (1 or 0), [T] each.

// Of two numbers the larger; what is no number stays so.
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
    // What is not finite moves nothing.
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

// What changes from launch to launch.
struct Listed {
  long long at[256];
};

// For src/train/taps.rs: parts of the squares of float32 tensors, added up in one order: parts [tensors, P], a block each.
// `tensors` has where they lie and how many numbers they have, one pair after the other. Blocks of a power of two.
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

// squares [T]: what the parts [K, P] of the tensors of each task add up to, over the square of its weight; 0 where it has none.
// `tasks` has whose each of the K tensors is. One block, a thread a task.
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
