// The frame-by-frame part of an LSTM layer, forward and backward; see training/lstm.py.
//
// Arrays are contiguous, (sequence, frame, unit); states and edges (sequence, unit) and (edge,
// sequence, unit). Gates come in torch's order: input, forget, cell, output. `Stored` is what is kept between the two directions, float or bfloat16; sums
// and cells are float. Sequences are shared out among threads, each of which goes through all
// frames by itself, so threads never wait for each other.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.hpp"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float read(float x) { return x; }

inline float read(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void write(float x, float& y) { y = x; }

inline void write(float x, bfloat16& y) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  y.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float exponential(float x) {  // 2^n times a polynomial of the rest, relative error 1e-7
  x = std::min(std::max(x, -87.0f), 87.0f);
  const float n = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return y * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float tanh_of(float x) { return 2.0f / (1.0f + exponential(-2.0f * x)) - 1.0f; }

// ---------------------------------------------------------------- products with packed weights

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kPanel = 2 * kLanes;  // columns whose sums stay in registers
constexpr int kRows = 6;
using Vector = float __attribute__((vector_size(4 * kLanes), aligned(4)));

template <int n_rows>
void multiply_panel(const float* a, long stride, const float* panel, long depth, float* c, long width) {
  Vector sums[n_rows][2] = {};
  for (long k = 0; k < depth; ++k) {
    const Vector* b = reinterpret_cast<const Vector*>(panel + k * kPanel);
    for (int m = 0; m < n_rows; ++m) {
      const float x = a[m * stride + k];
      sums[m][0] += b[0] * x;
      sums[m][1] += b[1] * x;
    }
  }
  for (int m = 0; m < n_rows; ++m) {
    std::memcpy(c + m * width, sums[m], sizeof sums[m]);
  }
}

// A matrix (depth, width), packed so that a product reads it from end to end.
class Weights {
 public:
  // Element (k, n) is w[k * down + n * right].
  Weights(const float* w, long depth, long width, long down, long right, bool tiles)
      : depth_(depth), tiles_(tiles), padded_((width + kPanel - 1) / kPanel * kPanel) {
    if (tiles_) {
      pairs_.resize(depth * width);
      bfloat16* to = pairs_.data();
      for (long n = 0; n < width; n += 16)
        for (long k = 0; k < depth; k += 2)
          for (long column = n; column < n + 16; ++column)
            for (long row = k; row < k + 2; ++row) write(w[row * down + column * right], *to++);
      width_ = width;
      return;
    }
    panels_.assign(depth * padded_, 0.0f);
    for (long n = 0; n < width; ++n)
      for (long k = 0; k < depth; ++k)
        panels_[(n / kPanel * depth + k) * kPanel + n % kPanel] = w[k * down + n * right];
    width_ = padded_;
  }

  // Columns of a product, padding included.
  long width() const { return width_; }

  // c (n_rows, width()) = a (n_rows, depth) times this.
  void multiply(const float* a, long n_rows, float* c) const {
    for (long first = 0; first < padded_; first += kPanel) {
      const float* panel = panels_.data() + first * depth_;
      long m = 0;
      for (; m + kRows <= n_rows; m += kRows)
        multiply_panel<kRows>(a + m * depth_, depth_, panel, depth_, c + m * width_ + first, width_);
      const float* rest = a + m * depth_;
      float* to = c + m * width_ + first;
      switch (n_rows - m) {
        case 1: multiply_panel<1>(rest, depth_, panel, depth_, to, width_); break;
        case 2: multiply_panel<2>(rest, depth_, panel, depth_, to, width_); break;
        case 3: multiply_panel<3>(rest, depth_, panel, depth_, to, width_); break;
        case 4: multiply_panel<4>(rest, depth_, panel, depth_, to, width_); break;
        case 5: multiply_panel<5>(rest, depth_, panel, depth_, to, width_); break;
        default: break;
      }
    }
  }

  // The same on the processor's matrix unit, or by way of float.
  void multiply(const bfloat16* a, long n_rows, float* c) {
#if HAS_TILES
    if (tiles_) {
      for (long m = 0; m < n_rows; m += 16)
        multiply_tiles(a + m * depth_, std::min(16L, n_rows - m), c + m * width_);
      return;
    }
#endif
    wide_.resize(n_rows * depth_);
    for (long i = 0; i < n_rows * depth_; ++i) wide_[i] = read(a[i]);
    multiply(wide_.data(), n_rows, c);
  }

 private:
#if HAS_TILES
  void multiply_tiles(const bfloat16* a, long n_rows, float* c) const {
    alignas(64) uint8_t shape[64] = {1};  // palette 1: bytes of a row from 16 on, rows from 48 on
    for (int tile = 0; tile < 7; ++tile) {
      shape[16 + 2 * tile] = 64;
      shape[48 + tile] = tile < 5 ? n_rows : 16;
    }
    _tile_loadconfig(shape);
    const long n_tiles = depth_ / 32;
    for (long n = 0; n < width_; n += 64) {
      const bfloat16* b = pairs_.data() + n * depth_;
      const long across = n_tiles * 512;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (long k = 0; k < n_tiles; ++k, b += 512) {
        _tile_loadd(4, a + 32 * k, depth_ * 2);
        _tile_loadd(5, b, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, b + across, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, b + 2 * across, 64);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, b + 3 * across, 64);
        _tile_dpbf16ps(3, 4, 6);
      }
      _tile_stored(0, c + n, width_ * 4);
      _tile_stored(1, c + n + 16, width_ * 4);
      _tile_stored(2, c + n + 32, width_ * 4);
      _tile_stored(3, c + n + 48, width_ * 4);
    }
    _tile_release();
  }
#endif

  long depth_, width_;
  bool tiles_;
  long padded_;
  std::vector<float> panels_, wide_;
  std::vector<bfloat16> pairs_;
};

// ---------------------------------------------------------------- the cell

template <typename Stored>
void step_forward(long size, const Stored* __restrict__ inputs,
                  const float* __restrict__ recurrent, const float* __restrict__ cell,
                  Stored* __restrict__ gates, float* __restrict__ new_cell,
                  Stored* __restrict__ output) {
  for (long j = 0; j < size; ++j) {
    const float enter = sigmoid(read(inputs[j]) + recurrent[j]);
    const float keep = sigmoid(read(inputs[size + j]) + recurrent[size + j]);
    const float candidate = tanh_of(read(inputs[2 * size + j]) + recurrent[2 * size + j]);
    const float leave = sigmoid(read(inputs[3 * size + j]) + recurrent[3 * size + j]);
    const float c = keep * cell[j] + enter * candidate;
    write(enter, gates[j]);
    write(keep, gates[size + j]);
    write(candidate, gates[2 * size + j]);
    write(leave, gates[3 * size + j]);
    new_cell[j] = c;
    write(leave * tanh_of(c), output[j]);
  }
}

template <typename Stored>
void step_backward(long size, const Stored* __restrict__ gates, const float* __restrict__ cell,
                   const float* __restrict__ new_cell, const Stored* __restrict__ d_output,
                   const float* __restrict__ d_later, float* __restrict__ d_cell,
                   Stored* __restrict__ d_gates) {
  for (long j = 0; j < size; ++j) {
    const float enter = read(gates[j]), keep = read(gates[size + j]);
    const float candidate = read(gates[2 * size + j]), leave = read(gates[3 * size + j]);
    const float squashed = tanh_of(new_cell[j]);
    const float dh = read(d_output[j]) + d_later[j];
    const float dc = d_cell[j] + dh * leave * (1.0f - squashed * squashed);
    write(dc * candidate * enter * (1.0f - enter), d_gates[j]);
    write(dc * cell[j] * keep * (1.0f - keep), d_gates[size + j]);
    write(dc * enter * (1.0f - candidate * candidate), d_gates[2 * size + j]);
    write(dh * squashed * leave * (1.0f - leave), d_gates[3 * size + j]);
    d_cell[j] = dc * keep;
  }
}

// The frames of some sequences, in the order in which they are read.
struct Frames {
  long n_frames, n_sequences, size;
  const long* order;  // (sequence, frame); null reads from first to last

  // Place of the frame that sequence `i` reads as its `t`-th.
  long at(long i, long t) const {
    return i * n_frames + (order == nullptr ? t : order[i * n_frames + t]);
  }
};

template <typename Stored>
void forward(Frames frames, long n_threads, bool tiles, long edge_every, const float* weight,
             const Stored* inputs, const Stored* first_output, const float* first_cell,
             Stored* gates, Stored* outputs, Stored* before, float* cells, float* edges) {
  const long size = frames.size;
  const Weights packed(weight, size, 4 * size, 1, size, tiles);
  share(frames.n_sequences, n_threads, [&](long first, long n) {
    Weights weights = packed;
    std::vector<float> recurrent(n * weights.width());
    std::vector<Stored> held(first_output + first * size, first_output + (first + n) * size);
    for (long t = 0; t < frames.n_frames; ++t) {
      weights.multiply(held.data(), n, recurrent.data());
      for (long i = 0; i < n; ++i) {
        const long now = frames.at(first + i, t);
        const float* cell = t == 0 ? first_cell + (first + i) * size
                                   : cells + frames.at(first + i, t - 1) * size;
        std::copy_n(&held[i * size], size, before + now * size);
        step_forward(size, inputs + now * 4 * size, &recurrent[i * weights.width()], cell,
                     gates + now * 4 * size, cells + now * size, outputs + now * size);
        std::copy_n(outputs + now * size, size, &held[i * size]);
        if ((t + 1) % edge_every == 0) {
          const long edge = ((t + 1) / edge_every - 1) * frames.n_sequences + first + i;
          std::copy_n(cells + now * size, size, edges + edge * size);
        }
      }
    }
  });
}

template <typename Stored>
void backward(Frames frames, long n_threads, bool tiles, long edge_every, const float* weight,
              const Stored* gates, const float* first_cell, const float* cells,
              const Stored* d_outputs, const float* d_edges, Stored* d_gates, float* d_output,
              float* d_cell) {
  const long size = frames.size;
  const Weights packed(weight, 4 * size, size, size, 1, tiles);
  std::fill_n(d_cell, frames.n_sequences * size, 0.0f);
  share(frames.n_sequences, n_threads, [&](long first, long n) {
    Weights weights = packed;
    const long width = weights.width();
    std::vector<float> d_later(n * width, 0.0f);
    std::vector<Stored> held(n * 4 * size);
    for (long t = frames.n_frames - 1; t >= 0; --t) {
      if ((t + 1) % edge_every == 0) {
        const long edge = ((t + 1) / edge_every - 1) * frames.n_sequences + first;
        for (long j = 0; j < n * size; ++j) d_cell[first * size + j] += d_edges[edge * size + j];
      }
      for (long i = 0; i < n; ++i) {
        const long now = frames.at(first + i, t);
        const float* cell = t == 0 ? first_cell + (first + i) * size
                                   : cells + frames.at(first + i, t - 1) * size;
        step_backward(size, gates + now * 4 * size, cell, cells + now * size,
                      d_outputs + now * size, &d_later[i * width], d_cell + (first + i) * size,
                      &held[i * 4 * size]);
        std::copy_n(&held[i * 4 * size], 4 * size, d_gates + now * 4 * size);
      }
      weights.multiply(held.data(), n, d_later.data());
    }
    for (long i = 0; i < n; ++i)
      std::copy_n(&d_later[i * width], size, d_output + (first + i) * size);
  });
}

}  // namespace

extern "C" {

// Whether bfloat16 products of layers of `size` units run on a matrix unit.
int lstm_has_tiles(long size) {
#if HAS_TILES
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl of Linux
  return size % 64 == 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}

#define DEFINE(NAME, STORED)                                                                       \
  void lstm_forward_##NAME(long n_sequences, long n_frames, long size, long n_threads, int tiles,  \
                           long edge_every, const long* order, const float* weight,                \
                           const STORED* inputs, const STORED* first_output,                       \
                           const float* first_cell, STORED* gates, STORED* outputs,                \
                           STORED* before, float* cells, float* edges) {                           \
    forward<STORED>({n_frames, n_sequences, size, order}, n_threads, tiles, edge_every, weight,    \
                    inputs, first_output, first_cell, gates, outputs, before, cells, edges);       \
  }                                                                                                \
  void lstm_backward_##NAME(long n_sequences, long n_frames, long size, long n_threads, int tiles, \
                            long edge_every, const long* order, const float* weight,               \
                            const STORED* gates, const float* first_cell, const float* cells,      \
                            const STORED* d_outputs, const float* d_edges, STORED* d_gates,        \
                            float* d_output, float* d_cell) {                                      \
    backward<STORED>({n_frames, n_sequences, size, order}, n_threads, tiles, edge_every, weight,   \
                     gates, first_cell, cells, d_outputs, d_edges, d_gates, d_output, d_cell);     \
  }

DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
}
