// The moving average of src/optim/average.rs, over all weights at once: a += share (w - a), as torch.lerp rounds it.

// A block for each row of `table`: the address of some weights, that of their averages, and how many there are.
extern "C" __global__ void average(const long long* table, const float* share) {
  const long long* own = table + 3 * blockIdx.x;
  const float* weights = reinterpret_cast<const float*>(own[0]);
  float* averages = reinterpret_cast<float*>(own[1]);
  const int n = own[2];
  const float by = *share;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float off = weights[i] - averages[i];
    averages[i] = by < 0.5f ? averages[i] + by * off : weights[i] - off * (1 - by);
  }
}
