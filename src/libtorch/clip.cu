// The norm of a step's gradients, their divisor, and whether the step is skipped, as in src/train/clip.rs.

// Addresses, which change from step to step.
struct Listed {
  const void* at[256];
};

// One block. squares [n]: partial sums of the gradients' squares. values: the n_losses losses, then the norm.
// grad_scale: the gradients' divisor, skip (1 or 0), 1 - skip, and 1 / loss_scale, NaN in an overflow. `halted` becomes 1 at the first
// norm or loss that is not finite; from then on all steps are skipped. `limit` has the bits of a float; 0 is none.
// With to_grow > 0 the gradients are `loss_scale` times too large. While the scale exceeds 1, a norm that is not finite
// is an overflow: only this step is skipped, the scale is halved and the norm is -1. `sound` counts steps without
// overflow; after `to_grow` of them the scale doubles.
extern "C" __global__ void clip(
    const float* squares, float* halted, float* values, float* grad_scale, float* loss_scale, int* sound, int n, int n_losses,
    int limit, int to_grow, Listed losses) {
  extern __shared__ double shared[];
  const int i = threadIdx.x;
  double sum = 0;
  for (int k = i; k < n; k += blockDim.x) sum += squares[k];
  shared[i] = sum;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) shared[i] += shared[i + half];
  }
  if (i > 0) return;
  const float scale = to_grow ? *loss_scale : 1, most = __int_as_float(limit);
  float norm = (float)sqrt(shared[0]) / scale;
  // x * 0 != 0 exactly if x is infinite or NaN.
  const bool overflow = to_grow && scale > 1 && norm * 0 != 0;
  if (overflow) {
    norm = 0, *loss_scale = scale * 0.5f, *sound = 0;
  } else if (to_grow && ++*sound == to_grow) {
    *sound = 0;
    if (scale * 2 * 0 == 0) *loss_scale = scale * 2;
  }
  float all = norm;
  for (int k = 0; k < n_losses; k++) all += values[k] = *(const float*)losses.at[k];
  *halted = *halted > 0 || all * 0 != 0;
  values[n_losses] = overflow ? -1 : norm;
  const float over = most > 0 ? (norm + 1e-6f) / most : 1, skip = *halted > 0 || overflow;
  grad_scale[0] = (over < 1 ? 1 : over) * scale, grad_scale[1] = skip, grad_scale[2] = 1 - skip, grad_scale[3] = overflow ? __int_as_float(0x7fc00000) : 1 / scale;
}
