// The CRF's forward-backward pass over a batch in three launches; src/model/heads/crf.rs does the same with operators.
//
// b sentences, W words, C tags; float64 with a running maximum, as in crf.rs. All sums have a fixed order. x and its gradient
// to_x [b, W, C] have rows by_row apart and words by_word, in memory order of either.

#define INF __longlong_as_double(0x7ff0000000000000)

// Scores in float64, constraints included if `constrained`, and for the transitions their exp (step) and its transpose
// (step_back). One thread per transition.
extern "C" __global__ void crf_scores(
    const float* transitions, const float* start, const float* end, const float* pairs, const float* first, double* scores, double* step,
    double* step_back, double* starts, double* ends, int n_tags, int constrained) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x, i = at / n_tags, j = at % n_tags;
  if (i >= n_tags) return;
  scores[at] = transitions[at] + (constrained ? (double)pairs[at] : 0);
  step[at] = step_back[j * n_tags + i] = exp(scores[at]);
  if (i == 0) starts[j] = start[j] + (constrained ? (double)first[j] : 0), ends[j] = end[j];
}

// The largest of n numbers and the sum of n products; four at a time, so that they do not wait for each other.
__device__ double largest(const double* values, int n) {
  double most[4] = {-INF, -INF, -INF, -INF};
  int i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; k++) most[k] = fmax(most[k], values[i + k]);
  for (; i < n; i++) most[0] = fmax(most[0], values[i]);
  return fmax(fmax(most[0], most[1]), fmax(most[2], most[3]));
}

__device__ double dot(const double* values, const double* column, int n) {
  double sums[4] = {0, 0, 0, 0};
  int i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; k++) sums[k] += values[i + k] * column[(i + k) * n];
  for (; i < n; i++) sums[0] += values[i] * column[i * n];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// One block per sentence. Half of its threads go forward, half back, each with a thread per tag. Inputs: x [b, W, C]; labels
// [b, W], -1 beyond the end; transitions, their exp (step) and its transpose (step_back), [C, C]. Outputs: alphas and betas
// [b, W, C]; left and right [b, W, C], the factors of the expected transitions into word t, by the tag of word t-1 and of
// word t; scales [b, W, 2], the maxima taken out of both; to_x [b, W, C], the gradient; pairs [b, W], the gold transition
// into each word (from * C + to), or -1; lasts [b], the index of the last word; losses [b], the negative log-likelihoods.
extern "C" __global__ void __launch_bounds__(1024) crf_sentences(
    const float* x, const long long* labels, const double* transitions, const double* step, const double* step_back,
    const double* start, const double* end, double* alphas, double* betas, double* left, double* right, double* scales, float* to_x,
    int* pairs, int* lasts, double* losses, int n_words, int n_tags, int by_row, int by_word) {
  extern __shared__ double shared[];
  const int half = blockDim.x / 2, c = threadIdx.x % half, at_word = n_words * n_tags;
  const bool back = threadIdx.x >= half, on = c < n_tags;
  double *now = shared + back * 2 * half, *before = now + half, *terms = shared + 4 * half;
  const size_t row = blockIdx.x;
  x += row * by_row, to_x += row * by_row, alphas += row * at_word, betas += row * at_word;
  left += row * at_word, right += row * at_word, labels += row * n_words, pairs += row * n_words, scales += row * n_words * 2;
  int n = 0;
  while (n < n_words && labels[n] >= 0) n++;

  // The score of the gold tags; the threads share the words.
  double score = 0;
  for (int t = threadIdx.x; t < n_words; t += blockDim.x) {
    int pair = -1;
    if (t < n) {
      score += x[t * by_word + labels[t]];
      if (t > 0) {
        pair = labels[t - 1] * n_tags + labels[t];
        score += transitions[pair];
      }
    }
    pairs[t] = pair;
  }
  terms[threadIdx.x] = score;

  // alpha_t(c): log-sum of all paths that end in tag c at word t. beta_t(c): log-sum of all continuations from there.
  double* sums = back ? betas : alphas;
  const double* steps = back ? step_back : step;
  double sum = !on ? -INF : back ? end[c] : start[c] + x[c];
  for (int i = 1; i < n; i++) {
    // Forward, alpha of the word before is read; back, beta and the score of the word after.
    const int t = back ? n - i : i - 1, next = back ? t - 1 : i;
    if (on) sums[t * n_tags + c] = sum;
    if (back && on) sum += x[t * by_word + c];
    now[c] = sum;
    __syncthreads();
    const double most = largest(now, n_tags);
    before[c] = exp(sum - most);
    __syncthreads();
    // The factors of the transitions between both words.
    const int to = back ? t : next;
    if (on) (back ? right : left)[to * n_tags + c] = before[c];
    if (c == 0) scales[2 * to + back] = most;
    if (on) sum = log(dot(before, steps + c, n_tags)) + most + (back ? 0 : x[next * by_word + c]);
  }
  if (n > 0 && on) sums[(back ? 0 : n - 1) * n_tags + c] = sum;
  // Forward, all paths.
  now[c] = back || !on ? -INF : sum + end[c];
  __syncthreads();
  const double most = largest(shared, n_tags);
  if (!back) before[c] = exp(now[c] - most);
  __syncthreads();
  double all = 0;
  for (int i = 0; i < n_tags; i++) all += shared[half + i];
  const double log_z = log(all) + most;
  if (threadIdx.x == 0) {
    double gold = 0;
    for (int i = 0; i < blockDim.x; i++) gold += terms[i];
    if (n > 0) gold += start[labels[0]] + end[labels[n - 1]];
    losses[row] = n > 0 ? log_z - gold : 0;
    lasts[row] = n - 1;
  }
  for (int i = threadIdx.x; i < at_word; i += blockDim.x) {
    const int t = i / n_tags, tag = i % n_tags;
    to_x[t * by_word + tag] = t < n ? exp(alphas[i] + betas[i] - log_z) - (labels[t] == tag) : 0;
    if (t == 0 || t >= n) left[i] = right[i] = 0;
    // Limited, so that exp stays finite where a forbidden transition joins the best tags of both sides.
    else left[i] *= exp(fmin(scales[2 * t] + scales[2 * t + 1] - log_z, 700.0));
  }
}

// Sums over the batch. One block for the transitions from each tag, then one each for the start tags, the end tags and
// the loss. In a block, threads along x are tags, and those along y share the rows.
extern "C" __global__ void __launch_bounds__(1024) crf_batch(
    const double* left, const double* right, const double* step, const int* pairs, const float* to_x, const int* lasts,
    const double* losses, float* to_transitions, float* to_start, float* to_end, float* loss, int n_rows, int n_words,
    int n_tags, int by_row, int by_word) {
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
      if (lasts[n] >= 0) sum += to_x[(size_t)n * by_row + t * by_word + j];
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
