// Linear layers whose weights are laid out in groups of 16 rows, so that one row of vectors goes
// through memory once and in order: y = x W^T + b, for one token as for many.
//
// fp32 and bf16: [N / 16][K][16]; a bf16 vector holds rows r and r + 8 side by side. int8:
// [N / 16][K / 4][16][4], activations are bytes around 128, each token by a scale of its own, and
// the sums are exact. K is a multiple of 8, rows are filled up to a multiple of 16.
// A token's result does not depend on how many others there are: each sum has one order.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {

struct Linear {
  int64_t format, rows, columns;
  int64_t unrounded;        // of int8: activations stay as they are, which is slow, and for comparing
  const void* weight;
  const float* scales;      // [rows] of int8, else null
  const int32_t* middles;   // [rows] of int8: 128 times the sum of the row, else null
  const float* bias;        // [rows] or null
};
}

namespace {

enum Format : int64_t { FP32, BF16, INT8 };

constexpr int64_t GROUP = 16;
constexpr int64_t AHEAD_BYTES = 8192;  // how far one token's weights are fetched before they are used

#if defined(__AVX2__) && defined(__FMA__)

inline void widen(const float* at, __m256& low, __m256& high) {
  low = _mm256_loadu_ps(at);
  high = _mm256_loadu_ps(at + 8);
  asm("" : "+x"(low), "+x"(high));  // GCC would load them again for each token
}
inline void widen(const uint16_t* at, __m256& low, __m256& high) {
  __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000u)));
}

inline void fetch(const void* weight, int64_t ahead) {
  _mm_prefetch(static_cast<const char*>(weight) + ahead, _MM_HINT_T0);
}

// sums[t][2 g], sums[t][2 g + 1]: the 16 rows of group g with token t. W is float or a bf16's bits.
template <int T, int G, typename W>
__attribute__((always_inline)) inline void float_tile(const float* x, int64_t row, const W* w, int64_t depth,
                                                      int64_t ahead, __m256 (*sums)[2 * G]) {
  __m256 acc[T][2 * G];
#pragma GCC unroll 8
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * G; i++) acc[t][i] = _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
#pragma GCC unroll 2
    for (int g = 0; g < G; g++)
#pragma GCC unroll 2
      for (int64_t b = 0; b < static_cast<int64_t>(2 * GROUP * sizeof(W)); b += 64)
        fetch(w + (g * depth + k) * GROUP, ahead + b);
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++)
#pragma GCC unroll 2
      for (int g = 0; g < G; g++) {
        __m256 low, high;
        widen(w + (g * depth + k + p) * GROUP, low, high);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
          __m256 one = _mm256_broadcast_ss(x + t * row + k + p);
          acc[t][2 * g] = _mm256_fmadd_ps(one, low, acc[t][2 * g]);
          acc[t][2 * g + 1] = _mm256_fmadd_ps(one, high, acc[t][2 * g + 1]);
        }
      }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * G; i++) sums[t][i] = acc[t][i];
}

// Adds four products of bytes to each of eight sums. Without a byte dot product two neighbours meet
// in 16 bits; runtime/int8.py rounds weights so that they fit.
inline __m256i add_products(__m256i acc, __m256i x, __m256i w) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(acc, x, w);
#elif defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, x, w);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
#endif
}

template <int T>
__attribute__((always_inline)) inline void int8_tile(const uint8_t* x, int64_t row, const int8_t* w, int64_t depth,
                                                     int64_t ahead, __m256i (*out)[2]) {
  __m256i acc[T][2];
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = _mm256_setzero_si256();
  for (int64_t k = 0; k < depth; k += 8) {
    fetch(w + k * GROUP, ahead);
    fetch(w + k * GROUP, ahead + 64);
#pragma GCC unroll 2
    for (int p = 0; p < 8; p += 4) {
      const __m256i* at = reinterpret_cast<const __m256i*>(w + (k + p) * GROUP);
      __m256i low = _mm256_loadu_si256(at), high = _mm256_loadu_si256(at + 1);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        int32_t four;
        std::memcpy(&four, x + t * row + k + p, 4);
        __m256i one = _mm256_set1_epi32(four);
        acc[t][0] = add_products(acc[t][0], one, low);
        acc[t][1] = add_products(acc[t][1], one, high);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) {
    out[t][0] = acc[t][0];
    out[t][1] = acc[t][1];
  }
}

// How many of the tokens that are left come next: tiles as even as they can be.
inline int next_tile(int64_t left, int most) {
  int64_t tiles = (left + most - 1) / most;
  return static_cast<int>((left + tiles - 1) / tiles);
}

// Tokens as bytes around 128 [T, K]; `steps` is what one unit of each is worth, NaN if x is not finite.
inline void to_bytes(const float* x, int64_t tokens, int64_t depth, uint8_t* bytes, float* steps) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t t = 0; t < tokens; t++, x += depth, bytes += depth) {
    __m256 top = _mm256_setzero_ps(), bad = top;
    for (int64_t k = 0; k < depth; k += 8) {
      __m256 eight = _mm256_loadu_ps(x + k);
      top = _mm256_max_ps(top, _mm256_andnot_ps(sign, eight));
      bad = _mm256_fmadd_ps(eight, _mm256_setzero_ps(), bad);
    }
    float tops[8], bads[8], largest = 1e-30f, wrong = 0;
    _mm256_storeu_ps(tops, top);
    _mm256_storeu_ps(bads, bad);
    for (int i = 0; i < 8; i++) {
      largest = tops[i] > largest ? tops[i] : largest;
      wrong += bads[i];
    }
    const float step = largest * (1.0f / 127.0f);
    const __m256 unit = _mm256_set1_ps(step);
    for (int64_t k = 0; k < depth; k += 8) {
      __m256i code = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + k), unit));
      code = _mm256_add_epi32(code, _mm256_set1_epi32(128));
      __m256i words = _mm256_packus_epi32(code, code);
      __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), order);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes + k), _mm256_castsi256_si128(packed));
    }
    steps[t] = step + wrong;
  }
}

// 16 results of a token, or fewer at the end of the rows; with `add`, on top of what is there
inline void put(float* to, __m256 low, __m256 high, int64_t count, bool add) {
  if (count >= GROUP) {
    if (add) {
      low = _mm256_add_ps(low, _mm256_loadu_ps(to));
      high = _mm256_add_ps(high, _mm256_loadu_ps(to + 8));
    }
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
    return;
  }
  float all[GROUP];
  _mm256_storeu_ps(all, low);
  _mm256_storeu_ps(all + 8, high);
  for (int64_t i = 0; i < count; i++) to[i] = add ? to[i] + all[i] : all[i];
}

// 16 values of an array that may end before, or zeros where there is none
inline void some(const float* from, int64_t count, __m256& low, __m256& high) {
  float all[GROUP] = {};
  if (from) std::memcpy(all, from, sizeof(float) * (count < GROUP ? count : GROUP));
  low = _mm256_loadu_ps(all);
  high = _mm256_loadu_ps(all + 8);
}

template <int T, int G, typename W>
inline void float_rows(const Linear& layer, const float* x, int64_t token, int64_t group, int64_t ahead, float* y,
                       int64_t y_row, bool add) {
  __m256 sums[T][2 * G], low, high;
  const int64_t columns = layer.columns;
  const W* weight = static_cast<const W*>(layer.weight) + group * GROUP * columns;
  float_tile<T, G>(x + token * columns, columns, weight, columns, ahead, sums);
  for (int g = 0; g < G; g++) {
    int64_t first = (group + g) * GROUP, left = layer.rows - first;
    some(layer.bias ? layer.bias + first : nullptr, left, low, high);
    for (int t = 0; t < T; t++)
      put(y + (token + t) * y_row + first, _mm256_add_ps(sums[t][2 * g], low),
          _mm256_add_ps(sums[t][2 * g + 1], high), left, add);
  }
}

template <typename W>
void float_groups(const Linear& layer, const float* x, int64_t tokens, int64_t first, int64_t end, float* y, int64_t y_row, bool add) {
  int64_t g = first;
  if (tokens <= 2)  // one sum a row would wait for itself: two groups at once
    for (; g + 2 <= end; g += 2) {
      if (tokens == 1) float_rows<1, 2, W>(layer, x, 0, g, AHEAD_BYTES, y, y_row, add);
      else float_rows<2, 2, W>(layer, x, 0, g, AHEAD_BYTES, y, y_row, add);
    }
  for (; g < end; g++) {
    int64_t ahead = GROUP * layer.columns * sizeof(W);
    for (int64_t t = 0; t < tokens;) {
      int count = next_tile(tokens - t, 6);
      switch (count) {
        case 1: float_rows<1, 1, W>(layer, x, t, g, ahead, y, y_row, add); break;
        case 2: float_rows<2, 1, W>(layer, x, t, g, ahead, y, y_row, add); break;
        case 3: float_rows<3, 1, W>(layer, x, t, g, ahead, y, y_row, add); break;
        case 4: float_rows<4, 1, W>(layer, x, t, g, ahead, y, y_row, add); break;
        case 5: float_rows<5, 1, W>(layer, x, t, g, ahead, y, y_row, add); break;
        default: float_rows<6, 1, W>(layer, x, t, g, ahead, y, y_row, add);
      }
      t += count;
      ahead = 0;  // what comes after it is on its way
    }
  }
}

template <int T>
inline void int8_rows(const Linear& layer, const uint8_t* x, const float* steps, int64_t token, int64_t group,
                      int64_t ahead, float* y,
                       int64_t y_row, bool add) {
  __m256i out[T][2];
  int64_t first = group * GROUP, left = layer.rows - first;
  const int8_t* weight = static_cast<const int8_t*>(layer.weight) + first * layer.columns;
  int8_tile<T>(x + token * layer.columns, layer.columns, weight, layer.columns, ahead, out);
  __m256 scale_low, scale_high, bias_low, bias_high;
  some(layer.scales + first, left, scale_low, scale_high);
  some(layer.bias ? layer.bias + first : nullptr, left, bias_low, bias_high);
  int32_t middles[GROUP] = {};
  std::memcpy(middles, layer.middles + first, sizeof(int32_t) * (left < GROUP ? left : GROUP));
  __m256i middle_low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(middles));
  __m256i middle_high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(middles + 8));
  for (int t = 0; t < T; t++) {
    __m256 step = _mm256_set1_ps(steps[token + t]);
    __m256 low = _mm256_cvtepi32_ps(_mm256_sub_epi32(out[t][0], middle_low));
    __m256 high = _mm256_cvtepi32_ps(_mm256_sub_epi32(out[t][1], middle_high));
    low = _mm256_fmadd_ps(_mm256_mul_ps(low, scale_low), step, bias_low);
    high = _mm256_fmadd_ps(_mm256_mul_ps(high, scale_high), step, bias_high);
    put(y + (token + t) * y_row + first, low, high, left, add);
  }
}

void int8_groups(const Linear& layer, const uint8_t* x, const float* steps, int64_t tokens, int64_t first, int64_t end,
                 float* y, int64_t y_row, bool add) {
  for (int64_t g = first; g < end; g++) {
    int64_t ahead = tokens == 1 ? AHEAD_BYTES : GROUP * layer.columns;
    for (int64_t t = 0; t < tokens;) {
      int count = next_tile(tokens - t, 5);
      switch (count) {
        case 1: int8_rows<1>(layer, x, steps, t, g, ahead, y, y_row, add); break;
        case 2: int8_rows<2>(layer, x, steps, t, g, ahead, y, y_row, add); break;
        case 3: int8_rows<3>(layer, x, steps, t, g, ahead, y, y_row, add); break;
        case 4: int8_rows<4>(layer, x, steps, t, g, ahead, y, y_row, add); break;
        default: int8_rows<5>(layer, x, steps, t, g, ahead, y, y_row, add);
      }
      t += count;
      ahead = 0;
    }
  }
}

// int8 weights with activations in fp32: what an int8 layer would give if it did not round those.
void unrounded_groups(const Linear& layer, const float* x, int64_t tokens, int64_t first, int64_t end, float* y,
                      int64_t y_row, bool add) {
  for (int64_t g = first; g < end; g++)
    for (int64_t t = 0; t < tokens; t++) {
      const int8_t* w = static_cast<const int8_t*>(layer.weight) + g * GROUP * layer.columns;
      __m256 acc[8] = {};  // of rows 2 i and 2 i + 1, four columns each
      for (int64_t k = 0; k < layer.columns; k += 4, w += 4 * GROUP) {
        __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + t * layer.columns + k));
        for (int i = 0; i < 8; i++) {
          __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + 8 * i));
          acc[i] = _mm256_fmadd_ps(four, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), acc[i]);
        }
      }
      for (int64_t r = 0; r < GROUP && g * GROUP + r < layer.rows; r++) {
        float four[4];
        _mm_storeu_ps(four, r % 2 ? _mm256_extractf128_ps(acc[r / 2], 1) : _mm256_castps256_ps128(acc[r / 2]));
        int64_t row = g * GROUP + r;
        float value = ((four[0] + four[1]) + (four[2] + four[3])) * layer.scales[row];
        if (layer.bias) value += layer.bias[row];
        float* to = y + t * y_row + row;
        *to = add ? *to + value : value;
      }
    }
}

// y [T, N] = x [T, K] through a layer; with `add`, on top of what y holds. Rows of y are `y_row` apart.
void multiply(const Linear& layer, const float* x, int64_t tokens, float* y, int64_t y_row, bool add, int64_t threads) {
  if (tokens == 0) return;  // two tokens' code would take it
  static thread_local std::vector<uint8_t> codes;
  static thread_local std::vector<float> units;
  const uint8_t* bytes = nullptr;
  const float* steps = nullptr;
  if (layer.format == INT8 && !layer.unrounded) {
    if (static_cast<int64_t>(codes.size()) < tokens * layer.columns) codes.resize(tokens * layer.columns);
    if (static_cast<int64_t>(units.size()) < tokens) units.resize(tokens);
    to_bytes(x, tokens, layer.columns, codes.data(), units.data());
    bytes = codes.data();
    steps = units.data();
  }
  const int64_t groups = (layer.rows + GROUP - 1) / GROUP;
  const int64_t pairs = (groups + 1) / 2;
  const bool large = threads > 1 && layer.rows * layer.columns * tokens > (1 << 17);
#pragma omp parallel num_threads(threads) if (large)
  {
#ifdef _OPENMP
    const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
#else
    const int64_t parts = 1, part = 0;
#endif
    int64_t first = 2 * (pairs * part / parts), end = 2 * (pairs * (part + 1) / parts);
    end = end < groups ? end : groups;
    switch (layer.format) {
      case FP32: float_groups<float>(layer, x, tokens, first, end, y, y_row, add); break;
      case BF16: float_groups<uint16_t>(layer, x, tokens, first, end, y, y_row, add); break;
      default:
        if (layer.unrounded) unrounded_groups(layer, x, tokens, first, end, y, y_row, add);
        else int8_groups(layer, bytes, steps, tokens, first, end, y, y_row, add);
    }
  }
}

#endif

}  // namespace

extern "C" {
#if defined(__AVX2__) && defined(__FMA__)
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
int64_t multiplies() { return 2; }  // any bytes
#else
int64_t multiplies() { return 1; }  // bytes whose pairs fit into 16 bits
#endif
void linear(const Linear* layer, const float* x, int64_t tokens, float* y, int64_t threads) {
  multiply(*layer, x, tokens, y, layer->rows, false, threads);
}
#else
int64_t multiplies() { return 0; }  // torch's kernels stay
#endif

// Whether this code uses all of the CPU's arithmetic, so that others cannot be faster by wider vectors.
#if defined(__AVX512F__) || defined(__AMX_TILE__)
int64_t uses_widest() { return 0; }
#else
int64_t uses_widest() { return 1; }
#endif
}
