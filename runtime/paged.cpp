// Paged attention over blocks of 16 tokens, without copying them: for decodes and short spans.
//
// One unit of work is one span (count tokens of one sequence) and one key-value head: its rows are
// count x G query heads. Softmax is online, one block at a time, in fp32. Pools are [N, KV, 16, D].
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int BLOCK = 16;
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t h8 __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t u8v __attribute__((vector_size(32), aligned(4), may_alias));

struct bf16 { uint16_t bits; };

inline v8 load(const float* at) { return *reinterpret_cast<const v8*>(at); }
inline v8 load(const bf16* at) {
  u8v wide = __builtin_convertvector(*reinterpret_cast<const h8*>(at), u8v) << 16;
  return reinterpret_cast<v8&>(wide);
}
inline void store(float* at, float x) { *at = x; }
inline void store(bf16* at, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  at->bits = std::isnan(x) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline float one(const float* at) { return *at; }
inline float one(const bf16* at) {
  uint32_t bits = uint32_t(at->bits) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline v8 splat(float x) { return v8{x, x, x, x, x, x, x, x}; }

inline v8 larger(v8 a, v8 b) { return a > b ? a : b; }

inline float sum(v8 a) {
  a += __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3);
  a += __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
  return a[0] + a[1];
}

inline float largest(v8 a) {
  a = larger(a, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3));
  a = larger(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5));
  return a[0] > a[1] ? a[0] : a[1];
}

// The sums of eight vectors, as one vector.
inline v8 sums_of(const v8* a) {
  v8 pairs[4], fours[2];
  for (int i = 0; i < 4; i++)
    pairs[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; i++)
    fours[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// exp(x) for x <= 0, about 1e-7 relative; below -87 the result is 0.
inline v8 exp8(v8 x) {
  const v8 floor_at = splat(-87.0f);
  i8 under = x < floor_at;
  x = under ? floor_at : x;
  v8 n = x * splat(1.44269504088896341f);
  const v8 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  v8 rounded = (n + magic) - magic;
  v8 r = x - rounded * splat(0.693359375f) + rounded * splat(2.12194440e-4f);
  v8 p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  i8 power = (__builtin_convertvector(rounded, i8) + 127) << 23;
  v8 result = p * reinterpret_cast<v8&>(power);
  return under ? splat(0.0f) : result;
}

}  // namespace

extern "C" {

struct Layer {
  void* keys;
  void* values;
  int64_t kv_heads, key_dim, value_dim;
};

struct Step {
  int64_t tokens;            // T of the step
  const int64_t* slots;      // [T] block * 16 + offset that each token is written to
  int64_t spans;             // those attended here
  const int64_t* starts;     // [spans] first row
  const int64_t* counts;     // [spans]
  const int64_t* contexts;   // [spans]
  const int64_t* tables;     // [spans] where its block numbers begin in `blocks`
  const int64_t* blocks;
  int64_t threads;
};
}

namespace {

// scores[row][16] of R = 1 or 2 rows against one block of keys, 8 / R tokens at a time
template <int R, typename E>
inline void dot(const float* q, int64_t stride, const E* keys, int64_t dim, float* scores) {
  constexpr int T = 8 / R;
  for (int t = 0; t < BLOCK; t += T) {
    v8 sums[8] = {};
    for (int64_t d = 0; d < dim; d += 8) {
      v8 x[R];
      for (int r = 0; r < R; r++) x[r] = load(q + r * stride + d);
      for (int i = 0; i < T; i++) {
        v8 k = load(keys + (t + i) * dim + d);
        for (int r = 0; r < R; r++) sums[r * T + i] += x[r] * k;
      }
    }
    v8 all = sums_of(sums);
    for (int r = 0; r < R; r++) std::memcpy(scores + r * BLOCK + t, reinterpret_cast<float*>(&all) + r * T, T * 4);
  }
}

// acc[row][D] += weights[row][16] @ values[16][D]
template <int R, int W, typename E>
inline void mix(const float* weights, const E* values, int64_t dim, int64_t d, float* acc) {
  v8 sums[R][W];
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) sums[r][w] = load(acc + r * dim + d + 8 * w);
  for (int t = 0; t < BLOCK; t++) {
    v8 v[W];
    for (int w = 0; w < W; w++) v[w] = load(values + t * dim + d + 8 * w);
    for (int r = 0; r < R; r++) {
      v8 p = splat(weights[r * BLOCK + t]);
      for (int w = 0; w < W; w++) sums[r][w] += p * v[w];
    }
  }
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) *reinterpret_cast<v8*>(acc + r * dim + d + 8 * w) = sums[r][w];
}

template <int R, typename E>
inline void mix_all(const float* weights, const E* values, int64_t dim, float* acc) {
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) mix<R, 4>(weights, values, dim, d, acc);
  for (; d < dim; d += 8) mix<R, 1>(weights, values, dim, d, acc);
}

struct Rows {
  float *q, *acc, *top, *total, *scores, *keys, *values;
};

// one block for R rows; [low, high) of each row are the positions it may see
template <int R, typename E>
inline void block_step(const Rows& rows, int64_t r0, const E* keys, const E* values,
                       const Layer& layer, int64_t first, const int64_t* low, const int64_t* high,
                       float softcap) {
  int64_t kd = layer.key_dim, vd = layer.value_dim;
  float* s = rows.scores;
  dot<R>(rows.q + r0 * kd, kd, keys, kd, s);
  for (int r = 0; r < R; r++) {
    float* mine = s + r * BLOCK;
    if (softcap > 0)
      for (int t = 0; t < BLOCK; t++) mine[t] = softcap * std::tanh(mine[t] / softcap);
    int64_t from = low[r0 + r] - first, to = high[r0 + r] - first;
    if (from > 0 || to < BLOCK)
      for (int t = 0; t < BLOCK; t++)
        if (t < from || t >= to) mine[t] = -INFINITY;
    float best = largest(larger(load(mine), load(mine + 8)));
    best = rows.top[r0 + r] > best ? rows.top[r0 + r] : best;
    if (best == -INFINITY) {  // nothing visible so far
      for (int t = 0; t < BLOCK; t++) mine[t] = 0;
      continue;
    }
    if (best > rows.top[r0 + r]) {
      float shrink = std::exp(rows.top[r0 + r] - best);
      rows.top[r0 + r] = best;
      rows.total[r0 + r] *= shrink;
      float* acc = rows.acc + (r0 + r) * vd;
      for (int64_t d = 0; d < vd; d += 8) *reinterpret_cast<v8*>(acc + d) = load(acc + d) * splat(shrink);
    }
    v8 a = exp8(load(mine) - splat(best)), b = exp8(load(mine + 8) - splat(best));
    rows.total[r0 + r] += sum(a + b);
    *reinterpret_cast<v8*>(mine) = a;
    *reinterpret_cast<v8*>(mine + 8) = b;
  }
  mix_all<R>(s, values, vd, rows.acc + r0 * vd);
}

template <typename E>
inline void all_rows(const Rows& rows, int64_t n, const E* keys, const E* values, const Layer& layer,
                     int64_t first, const int64_t* low, const int64_t* high, float softcap) {
  int64_t r = 0;
  for (; r + 2 <= n; r += 2) block_step<2>(rows, r, keys, values, layer, first, low, high, softcap);
  for (; r < n; r++) block_step<1>(rows, r, keys, values, layer, first, low, high, softcap);
}

template <typename E>
void unit(const Layer& layer, const Step& step, int64_t span, int64_t head, const E* query,
          int64_t q_head, int64_t q_row, int64_t groups, E* out, float scale, int64_t window,
          float softcap) {
  int64_t count = step.counts[span], context = step.contexts[span], start = step.starts[span];
  int64_t kd = layer.key_dim, vd = layer.value_dim, n = count * groups, heads = groups * layer.kv_heads;
  std::vector<float> memory(n * (kd + vd + 2) + BLOCK * (2 + kd + vd));
  std::vector<int64_t> limits(2 * n);
  int64_t *low = limits.data(), *high = low + n;
  Rows rows;
  rows.q = memory.data();
  rows.acc = rows.q + n * kd;
  rows.top = rows.acc + n * vd;
  rows.total = rows.top + n;
  rows.scores = rows.total + n;
  rows.keys = rows.scores + 2 * BLOCK;
  rows.values = rows.keys + BLOCK * kd;
  for (int64_t r = 0; r < n; r++) {
    int64_t token = r / groups, g = r % groups;
    const E* from = query + (head * groups + g) * q_head + (start + token) * q_row;
    for (int64_t d = 0; d < kd; d++) rows.q[r * kd + d] = one(from + d) * scale;
    rows.top[r] = -INFINITY;
    high[r] = context - count + token + 1;
    low[r] = window > 0 && high[r] > window ? high[r] - window : 0;
  }
  const int64_t* table = step.blocks + step.tables[span];
  for (int64_t b = low[0] / BLOCK; b * BLOCK < context; b++) {
    int64_t place = table[b] * layer.kv_heads + head, first = b * BLOCK;
    const E* keys = static_cast<const E*>(layer.keys) + place * BLOCK * kd;
    const E* values = static_cast<const E*>(layer.values) + place * BLOCK * vd;
    if (n > 2 && !std::is_same<E, float>::value) {
      for (int64_t d = 0; d < BLOCK * kd; d += 8) *reinterpret_cast<v8*>(rows.keys + d) = load(keys + d);
      for (int64_t d = 0; d < BLOCK * vd; d += 8) *reinterpret_cast<v8*>(rows.values + d) = load(values + d);
      all_rows(rows, n, rows.keys, rows.values, layer, first, low, high, softcap);
    } else {
      all_rows(rows, n, keys, values, layer, first, low, high, softcap);
    }
  }
  for (int64_t r = 0; r < n; r++) {
    int64_t token = r / groups, g = r % groups;
    E* to = out + ((start + token) * heads + head * groups + g) * vd;
    float share = 1.0f / rows.total[r];
    for (int64_t d = 0; d < vd; d++) store(to + d, rows.acc[r * vd + d] * share);
  }
}

template <typename E>
void write_kv(const Layer& layer, const Step& step, const E* key, int64_t k_head, int64_t k_row,
              const E* value, int64_t v_head, int64_t v_row) {
  int64_t kd = layer.key_dim, vd = layer.value_dim;
  for (int64_t t = 0; t < step.tokens; t++) {
    int64_t block = step.slots[t] / BLOCK, offset = step.slots[t] % BLOCK;
    for (int64_t h = 0; h < layer.kv_heads; h++) {
      int64_t row = (block * layer.kv_heads + h) * BLOCK + offset;
      std::memcpy(static_cast<E*>(layer.keys) + row * kd, key + h * k_head + t * k_row, kd * sizeof(E));
      std::memcpy(static_cast<E*>(layer.values) + row * vd, value + h * v_head + t * v_row, vd * sizeof(E));
    }
  }
}

template <typename E>
void attend(const Layer& layer, const Step& step, const E* query, int64_t q_head, int64_t q_row,
            int64_t groups, E* out, float scale, int64_t window, float softcap) {
  int64_t units = step.spans * layer.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(step.threads) if (units > 1 && step.threads > 1)
  for (int64_t u = 0; u < units; u++)
    unit(layer, step, u / layer.kv_heads, u % layer.kv_heads, query, q_head, q_row, groups, out, scale,
         window, softcap);
}

}  // namespace

extern "C" {
#define FORMAT(name, E)                                                                              \
  void write_##name(const Layer* l, const Step* s, const E* k, int64_t kh, int64_t kr, const E* v,   \
                    int64_t vh, int64_t vr) { write_kv<E>(*l, *s, k, kh, kr, v, vh, vr); }           \
  void attend_##name(const Layer* l, const Step* s, const E* q, int64_t qh, int64_t qr, int64_t g,   \
                     E* out, float scale, int64_t window, float softcap) {                           \
    attend<E>(*l, *s, q, qh, qr, g, out, scale, window, softcap); }
FORMAT(fp32, float)
FORMAT(bf16, bf16)
}
