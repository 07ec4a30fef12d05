// Paged attention over blocks of 16 tokens, without copying them: for decodes and short spans.
//
// One unit of work is one span (count tokens of one sequence) and one key-value head: its rows are
// count x G query heads. Softmax is online, one block at a time, in fp32. Pools are [N, KV, 16, D],
// in fp32, bf16, or int8 with bf16 scales (keys per channel, values per token); beside an int8 pool
// a token's own block is read from its tail, in full precision (runtime/int8_kv.py has the rule).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

struct bf16 { uint16_t bits; };

namespace {

constexpr int BLOCK = 16;
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));

inline v8 load(const float* at) { return *reinterpret_cast<const v8*>(at); }
#ifdef __AVX2__  // GCC 12 takes the general conversions below apart, element by element
inline v8 load(const bf16* at) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline v8 load(const int8_t* at) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
}
#else
inline v8 load(const bf16* at) {
  typedef uint16_t h8 __attribute__((vector_size(16), aligned(2), may_alias));
  typedef uint32_t w8 __attribute__((vector_size(32), aligned(4), may_alias));
  w8 wide = __builtin_convertvector(*reinterpret_cast<const h8*>(at), w8) << 16;
  return reinterpret_cast<v8&>(wide);
}
inline v8 load(const int8_t* at) {
  typedef int8_t b8 __attribute__((vector_size(8), aligned(1), may_alias));
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const b8*>(at), i8), v8);
}
#endif
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
  void* keys;  // the pool, or tails beside an int8 pool
  void* values;
  int64_t kv_heads, key_dim, value_dim;
  int8_t* key_codes;  // null: the pool is not int8
  bf16* key_scales;   // [N, KV, D]
  int8_t* value_codes;
  bf16* value_scales;  // [N, KV, 16]
};

struct Step {
  int64_t tokens;            // T of the step
  const int64_t* slots;      // [T] block (or tail) * 16 + offset of each token, -1: not written
  int64_t spans;             // those attended here
  const int64_t* starts;     // [spans] first row
  const int64_t* counts;     // [spans]
  const int64_t* contexts;   // [spans]
  const int64_t* tables;     // [spans] where its block numbers begin in `blocks`
  const int64_t* blocks;
  const int64_t* owns;       // [spans] where the tails of its own blocks begin in `tails`
  const int64_t* tails;      // slots, -1 for a block without
  int64_t complete;          // blocks that this step completes
  const int64_t* complete_blocks;
  const int64_t* complete_tails;
  int64_t threads;
};
}

namespace {

// The products of R = 1 or 2 rows with the next 8 / R keys.
// A function of its own, or GCC 12 runs out of registers where it is used.
template <int R, typename E>
__attribute__((noinline)) v8 products(const float* q, int64_t stride, const E* keys, int64_t dim) {
  constexpr int T = 8 / R;
  v8 sums[8] = {};
  for (int64_t d = 0; d < dim; d += 8) {
    v8 x[R];
    for (int r = 0; r < R; r++) x[r] = load(q + r * stride + d);
    for (int i = 0; i < T; i++) {
      v8 k = load(keys + i * dim + d);
      for (int r = 0; r < R; r++) sums[r * T + i] += x[r] * k;
    }
  }
  return sums_of(sums);
}

// scores[row][16] of R rows against one block of keys
template <int R, typename E>
inline void dot(const float* q, int64_t stride, const E* keys, int64_t dim, float* scores) {
  for (int t = 0; t < BLOCK; t += 8) {
    v8 first = products<R>(q, stride, keys + t * dim, dim);
    if (R == 1) {
      *reinterpret_cast<v8*>(scores + t) = first;
      continue;
    }
    v8 then = products<R>(q, stride, keys + (t + 4) * dim, dim);
    // Whole vectors are stored: they are read as such at once, and halves would have to be waited for.
    *reinterpret_cast<v8*>(scores + t) = __builtin_shufflevector(first, then, 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<v8*>(scores + BLOCK + t) = __builtin_shufflevector(first, then, 4, 5, 6, 7, 12, 13, 14, 15);
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
  float *q, *acc, *top, *total, *scaled, *scores, *keys, *values, *key_scales, *value_scales;
  int64_t *low, *high;
};

// A block as its rows read it: `first` is its first position, scales are null or those of int8.
template <typename E>
struct View {
  const E* keys;
  const E* values;
  const float* key_scales;
  const float* value_scales;
  int64_t first;
};

// one block for R rows; [low, high) of each row are the positions it may see
template <int R, typename E>
inline void block_step(const Rows& rows, int64_t r0, const View<E>& view, const Layer& layer,
                       float softcap) {
  int64_t kd = layer.key_dim, vd = layer.value_dim;
  float* s = rows.scores;
  const float* query = rows.q + r0 * kd;
  if (view.key_scales) {
    for (int r = 0; r < R; r++)
      for (int64_t d = 0; d < kd; d += 8)
        *reinterpret_cast<v8*>(rows.scaled + r * kd + d) = load(query + r * kd + d) * load(view.key_scales + d);
    query = rows.scaled;
  }
  dot<R>(query, kd, view.keys, kd, s);
  for (int r = 0; r < R; r++) {
    float* mine = s + r * BLOCK;
    if (softcap > 0)
      for (int t = 0; t < BLOCK; t++) mine[t] = softcap * std::tanh(mine[t] / softcap);
    int64_t from = rows.low[r0 + r] - view.first, to = rows.high[r0 + r] - view.first;
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
    if (view.value_scales) {
      a *= load(view.value_scales);
      b *= load(view.value_scales + 8);
    }
    *reinterpret_cast<v8*>(mine) = a;
    *reinterpret_cast<v8*>(mine + 8) = b;
  }
  mix_all<R>(s, view.values, vd, rows.acc + r0 * vd);
}

// rows [from, to) against one block
template <typename E>
inline void few_rows(const Rows& rows, int64_t from, int64_t to, const View<E>& view,
                     const Layer& layer, float softcap) {
  int64_t r = from;
  for (; r + 2 <= to; r += 2) block_step<2>(rows, r, view, layer, softcap);
  for (; r < to; r++) block_step<1>(rows, r, view, layer, softcap);
}

// the same; for many rows the block is widened to fp32 once
template <typename E>
inline void all_rows(const Rows& rows, int64_t from, int64_t to, const View<E>& view,
                     const Layer& layer, float softcap) {
  if (std::is_same<E, float>::value || to - from <= 2) return few_rows(rows, from, to, view, layer, softcap);
  int64_t keys = BLOCK * layer.key_dim, values = BLOCK * layer.value_dim;
  for (int64_t d = 0; d < keys; d += 8) *reinterpret_cast<v8*>(rows.keys + d) = load(view.keys + d);
  for (int64_t d = 0; d < values; d += 8) *reinterpret_cast<v8*>(rows.values + d) = load(view.values + d);
  few_rows(rows, from, to, View<float>{rows.keys, rows.values, view.key_scales, view.value_scales, view.first},
           layer, softcap);
}

template <typename E>
inline View<E> view_of(const void* keys, const void* values, int64_t block, int64_t head, int64_t first,
                       const Layer& layer) {
  int64_t place = (block * layer.kv_heads + head) * BLOCK;
  return {static_cast<const E*>(keys) + place * layer.key_dim,
          static_cast<const E*>(values) + place * layer.value_dim, nullptr, nullptr, first};
}

inline View<int8_t> int8_view(const Rows& rows, int64_t block, int64_t head, int64_t first, const Layer& layer) {
  View<int8_t> view = view_of<int8_t>(layer.key_codes, layer.value_codes, block, head, first, layer);
  const bf16* keys = layer.key_scales + (block * layer.kv_heads + head) * layer.key_dim;
  const bf16* values = layer.value_scales + (block * layer.kv_heads + head) * BLOCK;
  for (int64_t d = 0; d < layer.key_dim; d += 8) *reinterpret_cast<v8*>(rows.key_scales + d) = load(keys + d);
  for (int64_t t = 0; t < BLOCK; t += 8) *reinterpret_cast<v8*>(rows.value_scales + t) = load(values + t);
  view.key_scales = rows.key_scales;
  view.value_scales = rows.value_scales;
  return view;
}

// E is the pool's element, S that of query and output.
template <typename E, typename S>
void unit(const Layer& layer, const Step& step, int64_t span, int64_t head, const S* query,
          int64_t q_head, int64_t q_row, int64_t groups, S* out, float scale, int64_t window,
          float softcap) {
  int64_t count = step.counts[span], context = step.contexts[span], start = step.starts[span];
  int64_t kd = layer.key_dim, vd = layer.value_dim, n = count * groups, heads = groups * layer.kv_heads;
  std::vector<float> memory(n * (kd + vd + 2) + 2 * (kd + BLOCK) + BLOCK * (1 + kd + vd) + kd);
  std::vector<int64_t> limits(2 * n);
  float* next = memory.data();
  auto take = [&next](int64_t size) { float* mine = next; next += size; return mine; };
  Rows rows;
  rows.q = take(n * kd);
  rows.acc = take(n * vd);
  rows.top = take(n);
  rows.total = take(n);
  rows.scaled = take(2 * kd);
  rows.scores = take(2 * BLOCK);
  rows.keys = take(BLOCK * kd);
  rows.values = take(BLOCK * vd);
  rows.key_scales = take(kd);
  rows.value_scales = take(BLOCK);
  rows.low = limits.data();
  rows.high = rows.low + n;
  for (int64_t r = 0; r < n; r++) {
    int64_t token = r / groups, g = r % groups;
    const S* from = query + (head * groups + g) * q_head + (start + token) * q_row;
    for (int64_t d = 0; d < kd; d++) rows.q[r * kd + d] = one(from + d) * scale;
    rows.top[r] = -INFINITY;
    rows.high[r] = context - count + token + 1;
    rows.low[r] = window > 0 && rows.high[r] > window ? rows.high[r] - window : 0;
  }
  const int64_t* table = step.blocks + step.tables[span];
  int64_t own = (context - count) / BLOCK, seeing = 0;
  for (int64_t b = rows.low[0] / BLOCK; b * BLOCK < context; b++) {
    int64_t first = b * BLOCK;
    while (rows.high[seeing] <= first) seeing++;  // rows before do not reach this block
    if (!layer.key_codes) {
      all_rows(rows, seeing, n, view_of<E>(layer.keys, layer.values, table[b], head, first, layer), layer, softcap);
      continue;
    }
    int64_t beyond = seeing, tail = b < own ? -1 : step.tails[step.owns[span] + b - own];
    if (tail >= 0) {
      while (beyond < n && rows.high[beyond] <= first + BLOCK) beyond++;
      all_rows(rows, seeing, beyond, view_of<E>(layer.keys, layer.values, tail, head, first, layer), layer, softcap);
    }
    if (beyond < n) all_rows(rows, beyond, n, int8_view(rows, table[b], head, first, layer), layer, softcap);
  }
  for (int64_t r = 0; r < n; r++) {
    int64_t token = r / groups, g = r % groups;
    S* to = out + ((start + token) * heads + head * groups + g) * vd;
    float share = 1.0f / rows.total[r];
    for (int64_t d = 0; d < vd; d++) store(to + d, rows.acc[r * vd + d] * share);
  }
}

template <typename E>
inline void copy(E* to, const E* from, int64_t count) { std::memcpy(to, from, count * sizeof(E)); }
inline void copy(bf16* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) store(to + i, from[i]);
}

template <typename E, typename S>
void write_kv(const Layer& layer, const Step& step, const S* key, int64_t k_head, int64_t k_row,
              const S* value, int64_t v_head, int64_t v_row) {
  int64_t kd = layer.key_dim, vd = layer.value_dim;
  for (int64_t t = 0; t < step.tokens; t++) {
    if (step.slots[t] < 0) continue;
    int64_t block = step.slots[t] / BLOCK, offset = step.slots[t] % BLOCK;
    for (int64_t h = 0; h < layer.kv_heads; h++) {
      int64_t row = (block * layer.kv_heads + h) * BLOCK + offset;
      copy(static_cast<E*>(layer.keys) + row * kd, key + h * k_head + t * k_row, kd);
      copy(static_cast<E*>(layer.values) + row * vd, value + h * v_head + t * v_row, vd);
    }
  }
}

// The bf16 nearest to `largest` / 127, and what to divide by.
inline float scale_of(float largest, bf16* at) {
  store(at, largest / 127.0f);
  float scale = one(at);
  return scale == 0 ? 1.0f : scale;
}

// The larger magnitude; what is not finite is not hidden, unlike by std::fmax.
inline float larger_of(float top, float x) {
  x = std::fabs(x);
  return x > top || std::isnan(x) ? x : top;
}

inline int8_t code_of(float x, float scale) {
  float code = std::nearbyint(x / scale);
  if (std::isnan(code)) return 0;  // its scale is not finite, and tells
  return static_cast<int8_t>(code > 127 ? 127 : code < -127 ? -127 : code);
}

// Tails that are complete -> int8 blocks.
template <typename E>
void quantize(const Layer& layer, const Step& step) {
  int64_t kd = layer.key_dim, vd = layer.value_dim;
  for (int64_t c = 0; c < step.complete; c++)
    for (int64_t h = 0; h < layer.kv_heads; h++) {
      int64_t place = step.complete_blocks[c] * layer.kv_heads + h;
      View<E> tail = view_of<E>(layer.keys, layer.values, step.complete_tails[c], h, 0, layer);
      for (int64_t d = 0; d < kd; d++) {
        float top = 0;
        for (int t = 0; t < BLOCK; t++) top = larger_of(top, one(tail.keys + t * kd + d));
        float scale = scale_of(top, layer.key_scales + place * kd + d);
        for (int t = 0; t < BLOCK; t++)
          layer.key_codes[(place * BLOCK + t) * kd + d] = code_of(one(tail.keys + t * kd + d), scale);
      }
      for (int t = 0; t < BLOCK; t++) {
        float top = 0;
        for (int64_t d = 0; d < vd; d++) top = larger_of(top, one(tail.values + t * vd + d));
        float scale = scale_of(top, layer.value_scales + place * BLOCK + t);
        for (int64_t d = 0; d < vd; d++)
          layer.value_codes[(place * BLOCK + t) * vd + d] = code_of(one(tail.values + t * vd + d), scale);
      }
    }
}

template <typename E, typename S>
void attend(const Layer& layer, const Step& step, const S* query, int64_t q_head, int64_t q_row,
            int64_t groups, S* out, float scale, int64_t window, float softcap) {
  int64_t units = step.spans * layer.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(step.threads) if (units > 1 && step.threads > 1)
  for (int64_t u = 0; u < units; u++)
    unit<E>(layer, step, u / layer.kv_heads, u % layer.kv_heads, query, q_head, q_row, groups, out, scale,
         window, softcap);
}

}  // namespace

extern "C" {
#define FORMAT(name, E)                                                                              \
  void write_##name(const Layer* l, const Step* s, const E* k, int64_t kh, int64_t kr, const E* v,   \
                    int64_t vh, int64_t vr) {                                                        \
    write_kv<E>(*l, *s, k, kh, kr, v, vh, vr);                                                       \
    quantize<E>(*l, *s);                                                                             \
  }                                                                                                  \
  void attend_##name(const Layer* l, const Step* s, const E* q, int64_t qh, int64_t qr, int64_t g,   \
                     E* out, float scale, int64_t window, float softcap) {                           \
    attend<E>(*l, *s, q, qh, qr, g, out, scale, window, softcap);                                    \
  }
FORMAT(fp32, float)
FORMAT(bf16, bf16)
}
