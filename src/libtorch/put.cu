// Writes numbers that the host passes as an argument: a copy would make the GPU wait several microseconds.
struct Listed {
  long long at[480];
};

extern "C" __global__ void put(long long* out, int n, Listed numbers) {
  if (threadIdx.x < n) out[threadIdx.x] = numbers.at[threadIdx.x];
}
