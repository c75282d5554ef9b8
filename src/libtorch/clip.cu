// What a step's gradients come to, as src/train/clip.rs has it: the norm of all, what divides them, and whether they are taken.

// One block. given: the norms of n gradients, then n_losses losses; values: the losses, then the norm. grad_scale: what the gradients are
// divided by, 1 where they are left out, and 1 less that; left out they are from now on where `halted` is 1, or becomes so. `limit`
// has the bits of a float, 0 is none.
extern "C" __global__ void clip(
    const float* given, float* halted, float* values, float* grad_scale, int n, int n_losses, int limit) {
  extern __shared__ double shared[];
  const int i = threadIdx.x;
  double sum = 0;
  for (int k = i; k < n; k += blockDim.x) sum += (double)given[k] * given[k];
  shared[i] = sum;
  for (int k = i; k < n_losses; k += blockDim.x) values[k] = given[n + k];
  __syncthreads();
  if (i > 0) return;
  for (int k = 1; k < blockDim.x; k++) sum += shared[k];
  const float norm = sqrt(sum), most = __int_as_float(limit);
  float all = norm;
  for (int k = 0; k < n_losses; k++) all += given[n + k];
  // Infinity times 0 is no number, and no number is unlike 0.
  const float skip = *halted > 0 || all * 0 != 0;
  const float over = most > 0 ? (norm + 1e-6f) / most : 1;
  *halted = skip;
  values[n_losses] = norm;
  grad_scale[0] = over < 1 ? 1 : over, grad_scale[1] = skip, grad_scale[2] = 1 - skip;
}
