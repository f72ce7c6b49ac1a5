// Sums over all alignments of all label sequences under a trigram; see training/crf.py.
//
// A state is (last label, label before it), once for frames of the last label and once for blanks
// after it. Probabilities are rescaled in every frame. Each utterance is worked out by itself, so
// utterances are shared out among threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "threads.hpp"

namespace {

constexpr int kBoundary = 0;  // start and end in the trigram, the blank in the labels

struct Trigram {
  const float* p;  // P(third | first, second): (second, first, third)
  long n;
  const float* row(long second, long first) const { return p + (second * n + first) * n; }
  float twice(long label, long before) const { return row(label, before)[label]; }
};

using Buffer = std::vector<float>;

// Forward sums of one utterance: `spoken` and `silent` are (frame + 1, last, before).
double sum_forward(Trigram g, const float* probs, long n_frames, float* spoken, float* silent,
                   float* scales) {
  const long n = g.n, n_states = n * n;
  std::fill_n(spoken, n_states, 0.0f);
  std::fill_n(silent, n_states, 0.0f);
  silent[kBoundary * n + kBoundary] = 1.0f;
  double log_total = 0.0;
  Buffer arriving(n);
  for (long t = 0; t < n_frames; ++t) {
    const float *said = spoken + t * n_states, *paused = silent + t * n_states;
    float *now_said = spoken + (t + 1) * n_states, *now_paused = silent + (t + 1) * n_states;
    const float* prob = probs + t * n;
    for (long last = 0; last < n; ++last) {  // from (last, before) to (next, last)
      std::fill(arriving.begin(), arriving.end(), 0.0f);
      float repeated = 0.0f;
      for (long before = 0; before < n; ++before) {
        const float now = said[last * n + before];
        const float both = now + paused[last * n + before];
        now_paused[last * n + before] = both * prob[kBoundary];
        repeated += now * g.twice(last, before);
        const float* next = g.row(last, before);
        for (long k = 0; k < n; ++k) arriving[k] += both * next[k];
      }
      arriving[last] -= repeated;
      for (long next = 0; next < n; ++next) now_said[next * n + last] = arriving[next];
    }
    float scale = 0.0f;
    for (long label = 0; label < n; ++label) {
      const float p = label == kBoundary ? 0.0f : prob[label];
      for (long before = 0; before < n; ++before) {
        float& x = now_said[label * n + before];
        x = (x + said[label * n + before]) * p;
        scale += x + now_paused[label * n + before];
      }
    }
    const float inverse = 1.0f / scale;
    for (long i = 0; i < n_states; ++i) {
      now_said[i] *= inverse;
      now_paused[i] *= inverse;
    }
    scales[t] = scale;
    log_total += std::log(scale);
  }
  const float *said = spoken + n_frames * n_states, *paused = silent + n_frames * n_states;
  float total = 0.0f;
  for (long i = 0; i < n_states; ++i) total += (said[i] + paused[i]) * g.p[i * n + kBoundary];
  scales[n_frames] = total;
  return log_total + std::log(total);
}

// Posterior of each label in each frame: (frame, label).
void sum_backward(Trigram g, const float* probs, long n_frames, const float* spoken,
                  const float* silent, const float* scales, float* posteriors) {
  const long n = g.n, n_states = n * n;
  Buffer after_said(n_states), after_paused, arriving(n_states);  // arriving: (last, next)
  for (long i = 0; i < n_states; ++i)
    after_said[i] = g.p[i * n + kBoundary] / scales[n_frames];
  after_paused = after_said;
  for (long t = n_frames - 1; t >= 0; --t) {
    const float *said = spoken + (t + 1) * n_states, *paused = silent + (t + 1) * n_states;
    const float *prob = probs + t * n, inverse = 1.0f / scales[t];
    float blank = 0.0f;
    for (long label = 0; label < n; ++label) {
      float sum = 0.0f;
      const float p = label == kBoundary ? 0.0f : prob[label] * inverse;
      for (long before = 0; before < n; ++before) {
        const long i = label * n + before;
        sum += said[i] * after_said[i];
        blank += paused[i] * after_paused[i];
        after_said[i] *= p;  // from here on: what staying gives
        after_paused[i] *= prob[kBoundary] * inverse;
        arriving[before * n + label] = after_said[i];
      }
      posteriors[t * n + label] = sum;
    }
    posteriors[t * n + kBoundary] = blank;
    for (long last = 0; last < n; ++last) {
      const float* next = &arriving[last * n];
      for (long before = 0; before < n; ++before) {
        const long i = last * n + before;
        const float* third = g.row(last, before);
        float sum = 0.0f;
        for (long k = 0; k < n; ++k) sum += next[k] * third[k];
        after_paused[i] += sum;
        after_said[i] += after_paused[i] - next[last] * third[last];
      }
    }
  }
}

}  // namespace

extern "C" {

// `probs` and `posteriors` are (utterance, frame, label), `log_totals` (utterance,). Without
// `posteriors` only the totals are worked out.
void crf_sum(long n_utterances, long n_frames, long n_labels, long n_threads, const float* trigram,
             const float* probs, const long* lengths, float* log_totals, float* posteriors) {
  const Trigram g{trigram, n_labels};
  const long n_states = n_labels * n_labels;
  share(n_utterances, n_threads, [&](long first, long n) {
    for (long u = first; u < first + n; ++u) {
      const float* own = probs + u * n_frames * n_labels;
      Buffer spoken((lengths[u] + 1) * n_states), silent((lengths[u] + 1) * n_states);
      Buffer scales(lengths[u] + 1);
      log_totals[u] = static_cast<float>(
          sum_forward(g, own, lengths[u], spoken.data(), silent.data(), scales.data()));
      if (posteriors != nullptr)
        sum_backward(g, own, lengths[u], spoken.data(), silent.data(), scales.data(),
                     posteriors + u * n_frames * n_labels);
    }
  });
}
}
