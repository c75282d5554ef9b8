// The gradient of a table that is looked up, without atomics: the first place of an id adds up what all its places have, in their
// order.
//
// gradient [N, E] at the places of ids [N]; table [V, E] holds zeros. Blocks are places across and features down.

extern "C" __global__ void embedding_gradient(
    const float* gradient, const long long* ids, float* table, int n, int width, int skipped) {
  extern __shared__ int shared[];
  int *places = shared, *counts = shared + blockDim.x;
  const int place = blockIdx.x, e = blockIdx.y * blockDim.x + threadIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long id = ids[place];
  if (id == skipped) return;
  int earlier = 0;
  for (int i = threadIdx.x; i < place; i += blockDim.x) earlier |= ids[i] == id;
  if (__syncthreads_or(earlier)) return;
  float sum = 0;
  for (int chunk = place; chunk < n; chunk += blockDim.x) {
    int i = chunk + threadIdx.x;
    unsigned here = __ballot_sync(0xffffffff, i < n && ids[i] == id);
    if (lane == 0) counts[warp] = __popc(here);
    __syncthreads();
    int at = __popc(here & ((1u << lane) - 1)), count = 0;
    for (int w = 0; w < blockDim.x / 32; w++) {
      if (w < warp) at += counts[w];
      count += counts[w];
    }
    if (here >> lane & 1) places[at] = i;
    __syncthreads();
    if (e < width) {
#pragma unroll 4
      for (int k = 0; k < count; k++) sum += gradient[(size_t)places[k] * width + e];
    }
    __syncthreads();
  }
  if (e < width) table[id * width + e] = sum;
}
