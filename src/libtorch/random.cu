// Random draws of src/libtorch/random.rs: Philox 4x32-10 (Salmon 2011, "Parallel random numbers: as easy as 1, 2, 3"), with a
// stream for each row, as libtorch's at::Philox4_32 on the CPU. The seed is read on the device, so that a recorded step draws
// anew.

struct Words {
  unsigned at[4];
};

// As in src/rng.rs.
__device__ unsigned long long mix(unsigned long long x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The seed of a place in the model, from that of the step: Draws::derived. No head is 0, no site -1.
__device__ unsigned long long seed_of(const long long* seed, int head_low, int head_high, int site) {
  unsigned long long own = *seed, head = (unsigned long long)(unsigned)head_high << 32 | (unsigned)head_low;
  if (head) own = mix(own ^ head);
  return site < 0 ? own : mix(own + site);
}

// Draws 4 * block to 4 * block + 3 of a row.
__device__ Words draw(unsigned long long seed, unsigned long long row, unsigned block) {
  Words counter = {{block, 0, (unsigned)row, (unsigned)(row >> 32)}};
  unsigned key[2] = {(unsigned)seed, (unsigned)(seed >> 32)};
  for (int i = 0; i < 10; i++) {
    const unsigned long long one = 0xd2511f53ull * counter.at[0], other = 0xcd9e8d57ull * counter.at[2];
    counter = {{(unsigned)(other >> 32) ^ counter.at[1] ^ key[0], (unsigned)other, (unsigned)(one >> 32) ^ counter.at[3] ^ key[1], (unsigned)one}};
    key[0] += 0x9e3779b9u, key[1] += 0xbb67ae85u;
  }
  return counter;
}

// `share` has the bits of a float.
__device__ bool chosen(unsigned word, int share) { return (word >> 8) * 0x1p-24f < __int_as_float(share); }

// out [rows, width]: 1 with probability `share`, else 0. One thread per four elements of a row.
extern "C" __global__ void bernoulli(
    const long long* seed, float* out, int rows, int width, int first_row, int head_low, int head_high, int site, int share) {
  const int blocks = (width + 3) / 4, i = blockIdx.x * blockDim.x + threadIdx.x, row = i / blocks, block = i % blocks;
  if (row >= rows) return;
  const Words words = draw(seed_of(seed, head_low, head_high, site), (unsigned long long)first_row + row, block);
  for (int k = 0; k < 4 && 4 * block + k < width; k++) out[(size_t)row * width + 4 * block + k] = chosen(words.at[k], share);
}

// y = x * mask * scale for x [rows, T, F], rows by_row and positions by_position apart; the mask is 1 with probability `share`
// for each element, or if `locked` for each feature of a row. One thread per four draws.
extern "C" __global__ void dropout(
    const float* x, const long long* seed, float* y, int rows, int width, int features, int by_row, int by_position, int first_row,
    int head_low, int head_high, int site, int share, int scale, int locked) {
  const int times = locked ? width : 1, length = locked ? features : width * features, blocks = (length + 3) / 4;
  const int i = blockIdx.x * blockDim.x + threadIdx.x, block = i % blocks, time = i / blocks % times, row = i / blocks / times;
  if (row >= rows) return;
  const Words words = draw(seed_of(seed, head_low, head_high, site), (unsigned long long)first_row + row, block);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int drawn = 4 * block + k;
    if (drawn >= length) break;
    const size_t at = (size_t)row * by_row + (time + drawn / features) * by_position + drawn % features;
    y[at] = chosen(words.at[k], share) ? x[at] * __int_as_float(scale) : 0;
  }
}
