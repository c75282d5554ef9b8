// The CRF's forward-backward pass over a batch in two launches; src/model/heads/crf.rs does the same with operators.
//
// b sentences, W words, C tags; float64 with a running maximum, as in crf.rs. All sums have a fixed order.

#define INF __longlong_as_double(0x7ff0000000000000)

__device__ double largest(const double* values, int n) {
  double most = -INF;
  for (int i = 0; i < n; i++) most = fmax(most, values[i]);
  return most;
}

// One block per sentence, one thread per tag. Inputs: x [b, W, C]; labels [b, W], -1 beyond the end; transitions, their
// exp (step) and its transpose (step_back), [C, C]. Outputs: alphas [b, W, C]; left and right [b, W, C], the factors of
// the expected transitions into word t, by the tag of word t-1 and of word t; to_x [b, W, C], the gradient; pairs
// [b, W], the gold transition into each word (from * C + to), or -1; lasts [b], the index of the last word; losses [b],
// the negative log-likelihoods.
extern "C" __global__ void __launch_bounds__(1024) crf_sentences(
    const float* x, const long long* labels, const double* transitions, const double* step, const double* step_back,
    const double* start, const double* end, double* alphas, double* left, double* right, float* to_x, int* pairs, int* lasts,
    double* losses, int n_words, int n_tags) {
  extern __shared__ double shared[];
  double *now = shared, *before = shared + blockDim.x, *terms = shared + 2 * blockDim.x;
  const int c = threadIdx.x;
  const bool on = c < n_tags;
  const size_t row = (size_t)blockIdx.x * n_words;
  x += row * n_tags, alphas += row * n_tags, left += row * n_tags, right += row * n_tags, to_x += row * n_tags;
  labels += row, pairs += row;
  int n = 0;
  while (n < n_words && labels[n] >= 0) n++;

  // The score of the gold tags; the threads share the words.
  double score = 0;
  for (int t = c; t < n_words; t += blockDim.x) {
    int pair = -1;
    if (t < n) {
      score += x[t * n_tags + labels[t]];
      if (t > 0) {
        pair = labels[t - 1] * n_tags + labels[t];
        score += transitions[pair];
      }
    }
    pairs[t] = pair;
  }
  terms[c] = score;

  double alpha = on ? start[c] + x[c] : -INF;
  if (on) alphas[c] = alpha;
  for (int t = 1; t < n; t++) {
    now[c] = alpha;
    __syncthreads();
    double most = largest(now, n_tags);
    before[c] = exp(alpha - most);
    __syncthreads();
    if (on) {
      double sum = 0;
      for (int i = 0; i < n_tags; i++) sum += before[i] * step[i * n_tags + c];
      alpha = log(sum) + most + x[t * n_tags + c];
      alphas[t * n_tags + c] = alpha;
    }
  }
  now[c] = on ? alpha + end[c] : -INF;
  __syncthreads();
  double most = largest(now, n_tags);
  before[c] = exp(now[c] - most);
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < n_tags; i++) sum += before[i];
  const double log_z = log(sum) + most;
  if (c == 0) {
    double gold = 0;
    for (int i = 0; i < blockDim.x; i++) gold += terms[i];
    if (n > 0) gold += start[labels[0]] + end[labels[n - 1]];
    losses[blockIdx.x] = n > 0 ? log_z - gold : 0;
    lasts[blockIdx.x] = n - 1;
  }

  for (int t = n; t < n_words && on; t++) {
    int at = t * n_tags + c;
    left[at] = right[at] = 0, to_x[at] = 0;
  }
  double beta = on ? end[c] : -INF;
  for (int t = n - 1; t >= 0; t--) {
    int at = t * n_tags + c;
    if (on) to_x[at] = exp(alphas[at] + beta - log_z) - (labels[t] == c);
    if (t == 0) {
      if (on) left[c] = right[c] = 0;
      break;
    }
    double ahead = on ? x[at] + beta : -INF, behind = on ? alphas[at - n_tags] : -INF;
    __syncthreads();
    now[c] = ahead, terms[c] = behind;
    __syncthreads();
    double high = largest(now, n_tags), low = largest(terms, n_tags);
    before[c] = exp(ahead - high);
    __syncthreads();
    if (on) {
      left[at] = exp(behind - low) * exp(low + high - log_z);
      right[at] = before[c];
      double sum = 0;
      for (int j = 0; j < n_tags; j++) sum += before[j] * step_back[j * n_tags + c];
      beta = log(sum) + high;
    }
  }
}

// Sums over the batch. One block for the transitions from each tag, then one each for the start tags, the end tags and
// the loss. In a block, threads along x are tags, and those along y share the rows.
extern "C" __global__ void __launch_bounds__(1024) crf_batch(
    const double* left, const double* right, const double* step, const int* pairs, const float* to_x, const int* lasts,
    const double* losses, float* to_transitions, float* to_start, float* to_end, float* loss, int n_rows, int n_words,
    int n_tags) {
  extern __shared__ double shared[];
  const int i = blockIdx.x, j = threadIdx.x, from = threadIdx.y, by = blockDim.y;
  double sum = 0;
  if (i < n_tags && j < n_tags) {
    double gold = 0;
    for (int n = from; n < n_rows * n_words; n += by) {
      sum += left[(size_t)n * n_tags + i] * right[(size_t)n * n_tags + j];
      gold += pairs[n] == i * n_tags + j;
    }
    sum = sum * step[i * n_tags + j] - gold;
  } else if (i < n_tags + 2 && j < n_tags) {
    for (int n = from; n < n_rows; n += by) {
      int t = i == n_tags ? 0 : lasts[n];
      if (lasts[n] >= 0) sum += to_x[((size_t)n * n_words + t) * n_tags + j];
    }
  } else if (j == 0) {
    for (int n = from; n < n_rows; n += by) sum += losses[n];
  }
  shared[from * blockDim.x + j] = sum;
  __syncthreads();
  if (from > 0 || j >= n_tags) return;
  for (int k = 1; k < by; k++) sum += shared[k * blockDim.x + j];
  if (i < n_tags) to_transitions[i * n_tags + j] = sum;
  if (i == n_tags) to_start[j] = sum;
  if (i == n_tags + 1) to_end[j] = sum;
  if (i == n_tags + 2 && j == 0) *loss = sum;
}
