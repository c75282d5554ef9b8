// Numbers that the host tells the device, without a copy: a GPU waits several microseconds for one.
struct Listed {
  long long at[256];
};

extern "C" __global__ void put(long long* out, int n, Listed numbers) {
  if (threadIdx.x < n) out[threadIdx.x] = numbers.at[threadIdx.x];
}
