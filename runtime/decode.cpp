// A whole step of a model of Llama's kind in one call, from embedded tokens to logits: for steps of
// few tokens, where calling some three hundred operators takes as long as what they compute.
//
// Activations are fp32. Linear layers are those of linear.cpp, attention is that of paged.cpp.
#include "linear.cpp"
#include "paged.cpp"

extern "C" {

struct Pieces {  // a layer, its rows in one or more pieces
  int64_t count, rows, columns;
  const Linear* parts;
};

struct Block {
  Pieces qkv, out, gate_up, down;
  const float *norm_attention, *norm_mlp;
  const float *norm_query, *norm_key;  // [D] each, or null
  const Layer* kv;
  int64_t window;  // 0: none
};

struct Net {
  int64_t layers, hidden, middle, heads, kv_heads, dim;
  float eps, attention_scale, rotary_scale;
  const float* frequencies;  // [D / 2]
  const float* norm;
  const Block* blocks;
  Pieces head;
};
}

#if defined(__AVX2__) && defined(__FMA__)

namespace {

inline void norm(const float* x, const float* weight, float eps, int64_t size, float* y) {
  v8 squares = {};
  for (int64_t i = 0; i < size; i += 8) squares += load(x + i) * load(x + i);
  float shrink = 1.0f / std::sqrt(sum(squares) / size + eps);
  for (int64_t i = 0; i < size; i += 8) *reinterpret_cast<v8*>(y + i) = load(x + i) * splat(shrink) * load(weight + i);
}

void multiply(const Pieces& layer, const float* x, int64_t tokens, float* y, bool add, int64_t threads) {
  for (const Linear* part = layer.parts; part < layer.parts + layer.count; y += part->rows, part++)
    multiply(*part, x, tokens, y, layer.rows, add, threads);
}

// x[dim] turned by its position: the second half stands beside the first
inline void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

template <typename E>
void forward(const Net& net, const Step& step, const float* embedded, const int64_t* positions, int64_t kept,
             const int64_t* keep, float* logits) {
  int64_t tokens = step.tokens, hidden = net.hidden, dim = net.dim, half = dim / 2;
  int64_t q = net.heads * dim, kv = net.kv_heads * dim, wide = q + 2 * kv;
  std::vector<float> x(embedded, embedded + tokens * hidden), h(tokens * hidden), qkv(tokens * wide), attended(tokens * q),
      gate_up(tokens * 2 * net.middle), middle(tokens * net.middle), cosines(tokens * half), sines(tokens * half);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t i = 0; i < half; i++) {
      float angle = static_cast<float>(positions[t]) * net.frequencies[i];
      cosines[t * half + i] = std::cos(angle) * net.rotary_scale;
      sines[t * half + i] = std::sin(angle) * net.rotary_scale;
    }
  for (int64_t l = 0; l < net.layers; l++) {
    const Block& block = net.blocks[l];
    for (int64_t t = 0; t < tokens; t++) norm(x.data() + t * hidden, block.norm_attention, net.eps, hidden, h.data() + t * hidden);
    multiply(block.qkv, h.data(), tokens, qkv.data(), false, step.threads);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t n = 0; n < net.heads + net.kv_heads; n++) {
        float* head = qkv.data() + t * wide + n * dim;
        const float* weight = n < net.heads ? block.norm_query : block.norm_key;
        if (weight) norm(head, weight, net.eps, dim, head);
        rotate(head, cosines.data() + t * half, sines.data() + t * half, half);
      }
    const float *keys = qkv.data() + q, *values = keys + kv;
    write_kv<E>(*block.kv, step, keys, dim, wide, values, dim, wide);
    quantize<E>(*block.kv, step);
    attend<E>(*block.kv, step, qkv.data(), dim, wide, net.heads / net.kv_heads, attended.data(),
              net.attention_scale, block.window, 0.0f);
    multiply(block.out, attended.data(), tokens, x.data(), true, step.threads);
    for (int64_t t = 0; t < tokens; t++) norm(x.data() + t * hidden, block.norm_mlp, net.eps, hidden, h.data() + t * hidden);
    multiply(block.gate_up, h.data(), tokens, gate_up.data(), false, step.threads);
    for (int64_t t = 0; t < tokens; t++) {
      const float *gate = gate_up.data() + t * 2 * net.middle, *up = gate + net.middle;
      float* to = middle.data() + t * net.middle;
      for (int64_t i = 0; i < net.middle; i += 8) {
        v8 g = load(gate + i), e = exp8(larger(-g, g) * splat(-1.0f));  // exp(-|g|)
        v8 below = e / (splat(1.0f) + e), above = splat(1.0f) / (splat(1.0f) + e);
        *reinterpret_cast<v8*>(to + i) = g * (g < splat(0.0f) ? below : above) * load(up + i);
      }
    }
    multiply(block.down, middle.data(), tokens, x.data(), true, step.threads);
  }
  h.resize(kept * hidden);
  for (int64_t n = 0; n < kept; n++) norm(x.data() + keep[n] * hidden, net.norm, net.eps, hidden, h.data() + n * hidden);
  multiply(net.head, h.data(), kept, logits, false, step.threads);
}

}  // namespace

extern "C" {
#define STEP(name, E)                                                                                \
  void step_##name(const Net* net, const Step* step, const float* x, const int64_t* positions,       \
                   int64_t kept, const int64_t* keep, float* logits) {                               \
    forward<E>(*net, *step, x, positions, kept, keep, logits);                                       \
  }
STEP(fp32, float)
STEP(bf16, bf16)
}

#endif
