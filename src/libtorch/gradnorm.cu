// GradNorm's update of src/weighting/gradnorm.rs, which operators take in two dozen launches: one thread, for some tasks.
//
// Float64 throughout. losses, norms, weights, moved, Adam's moments and steps, and initial [T]; seen [3, T]; `given` has the numbers
// below, then priorities and presence (1 or 0), [T] each.

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
    ratios += losses[i] / at_least(initial[i], smallest_loss) * here[i];
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
    double training_rate = losses[i] / at_least(initial[i], smallest_loss) * here[i] / mean_ratio;
    double target = priorities[i] * here[i] * mean * pow(training_rate, alpha);
    double off = weights[i] * slope - target;
    double gradient = off > 0 ? slope : off < 0 ? -slope : 0 * off;
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
