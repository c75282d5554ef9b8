// out[b, t] = flat[starts[b] + t] within row b's length, else `fill`; n elements in rows of `width`.

extern "C" __global__ void gather_rows(
    const int* flat, const long long* starts, const long long* lengths, long long* out, int n, int width, int fill) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int b = i / width, t = i % width;
  out[i] = t < lengths[b] ? flat[starts[b] + t] : fill;
}
