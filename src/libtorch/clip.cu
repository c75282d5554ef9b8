// What a step's gradients come to, as src/train/clip.rs has it: the norm of all, what divides them, and whether they are taken.

// What lies elsewhere each step.
struct Listed {
  const void* at[256];
};

// One block. squares [n]: parts of the gradients' squares; values: the n_losses losses, then the norm. grad_scale: what the
// gradients are divided by, 1 where they are left out, 1 less that, and 1 where they are not finite; left out they are from now
// on where `halted` is 1, or becomes so. `limit` has the bits of a float, 0 is none. Where the gradients are `loss_scale` times
// too large, which adapts to them while it is more than 1, those that are not finite are left out this once, and the norm is
// -1; it doubles after `to_grow` steps without such ones, which `sound` counts.
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
  // Infinity times 0 is no number, and no number is unlike 0.
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
  grad_scale[0] = (over < 1 ? 1 : over) * scale, grad_scale[1] = skip, grad_scale[2] = 1 - skip, grad_scale[3] = overflow;
}
