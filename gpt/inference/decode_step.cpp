// One step of decoding on a CPU: the next token of each row in, fp32 logits out, keys and values appended to the cache.
//
// A token costs reading every weight once. So the whole step is one parallel region: each thread computes its share of the rows of every
// matrix, whose weights it reads in order, and between two products there is a barrier and no call. Activations are fp32 throughout;
// weights are fp32, bf16 or int8 with a scale per output. The loops are plain, for the compiler to vectorise. `native_library.py`
// builds and loads this, `native_step.py` calls it; the structs below are mirrored there, field by field.
//
// Shapes: R rows, E d_model, H query heads, K key/value heads, D head_dim, F d_ff, V outputs of the head, S slots of the cache.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bfloat16 = uint16_t;

enum Type : int64_t { FLOAT32, BFLOAT16, INT8 };
enum Activation : int64_t { GELU, GELU_TANH, SWIGLU };

struct Matrix {
    const void *weight;   // (out, in), row after row
    const float *scale;   // (out,) of int8, else null
    const float *bias;    // (out,) or null
    int64_t out, in;
};

struct Norm {
    const float *weight, *bias;  // bias may be null
};

struct Block {
    Norm attention_norm, feedforward_norm;
    const float *q_norm, *k_norm;     // (D,) or null
    Matrix qkv, out, up, down, gate;  // gate of swiglu only
};

struct Model {
    int64_t n_layer, n_head, n_kv_head, head_dim, d_model, d_ff, outputs, rotary_dim;
    int64_t weight_type, embedding_type, activation, rmsnorm, parallel_residual;
    double norm_eps, embedding_scale;
    const void *tokens;              // (V, E) of embedding_type
    const void *learned_positions;   // (context, E) of embedding_type, or null
    const float *fixed_positions;    // (context, E) or null
    const float *cos, *sin;          // (context, rotary_dim) or null
    const Block *blocks;             // (n_layer,)
    Norm final_norm;
    Matrix head;
};

struct Cache {
    float *const *keys, *const *values;  // n_layer of (R, K, S, D)
    const int64_t *padding;              // (R,) slots at the start of each row that nobody sees
    int64_t length, slots;               // of which `length` are filled
};

inline float widen(float value) { return value; }
inline float widen(bfloat16 value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline float read(const void *numbers, int64_t type, int64_t at) {
    return type == FLOAT32 ? static_cast<const float *>(numbers)[at] : widen(static_cast<const bfloat16 *>(numbers)[at]);
}

// What products read: rows of fp32 numbers for fp32 and bf16 weights.
template <class W> struct Input {
    using Number = float;
    std::vector<float> numbers;

    void set(const float *x, int64_t rows, int64_t width) { numbers.assign(x, x + rows * width); }
    float unit(int64_t) const { return 1; }
};

// For int8 weights, 16-bit integers and a step per row: products of integers are several times as fast as widening every weight to a
// float, and 16 bits are more than bf16's 8. A row's numbers are chosen so that no sum of products can exceed 32 bits:
// 128 sum|x| <= 2^31.
template <> struct Input<int8_t> {
    using Number = int16_t;
    std::vector<int16_t> numbers;
    std::vector<float> steps;

    void set(const float *x, int64_t rows, int64_t width) {
        numbers.resize(rows * width);
        steps.resize(rows);
        for (int64_t row = 0; row < rows; ++row, x += width) {
            float largest = 0, sum = 0;
#pragma omp simd reduction(max : largest) reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) {
                largest = std::max(largest, std::fabs(x[i]));
                sum += std::fabs(x[i]);
            }
            // Rounding adds at most 1/2 to each number.
            const float step = std::max(largest / 32767, sum / float((1 << 24) - width));
            const float inverse = step > 0 ? 1 / step : 0;
            int16_t *to = numbers.data() + row * width;
            for (int64_t i = 0; i < width; ++i) {
                const float number = x[i] * inverse;
                to[i] = int16_t(int32_t(number + (number < 0 ? -0.5f : 0.5f)));
            }
            steps[row] = std::isfinite(sum) ? step : NAN;  // no integer says so
        }
    }
    float unit(int64_t row) const { return steps[row]; }
};

template <class W> using Product = decltype(typename Input<W>::Number() * int8_t());  // float, or int of integers

// Not inlined, nor more general, since compilers vectorise the one and not the other.
template <class W> [[gnu::noinline]] float dot(const W *weights, const float *x, int64_t width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += widen(weights[i]) * x[i];
    return sum;
}

// sums[o][r] = weights[o] . x[r], of rows of `width` numbers.
template <int O, int R, class W> void dots(const W *weights, const float *x, int64_t width, float *sums) {
    for (int o = 0; o < O; ++o) {
        for (int r = 0; r < R; ++r) sums[o * R + r] = dot(weights + o * width, x + r * width, width);
    }
}

template <int O, int R> [[gnu::noinline]] void dots(const int8_t *weights, const int16_t *x, int64_t width, int32_t *sums) {
    int32_t s[O * R] = {};
    for (int64_t i = 0; i < width; ++i) {
        for (int o = 0; o < O; ++o) {
            for (int r = 0; r < R; ++r) s[o * R + r] += int32_t(weights[o * width + i]) * int32_t(x[r * width + i]);
        }
    }
    for (int i = 0; i < O * R; ++i) sums[i] = s[i];
}

struct Range {
    int64_t begin, end;
};

Range share(int64_t items, int thread, int threads) { return {items * thread / threads, items * (thread + 1) / threads}; }

// What one thread has to itself.
template <class W> struct Worker {
    const Model &model;
    const int thread, threads;
    const int64_t rows;
    Input<W> input{};
    std::vector<float> normed{}, head{}, scores{};

    // This thread's share of the outputs of `matrix`, times what `input` was set to, set or added to `to` (R, out).
    void multiply(const Matrix &matrix, float *to, bool add = false) const {
        constexpr int tile = 4;  // outputs by rows whose sums stay in registers
        const auto [begin, end] = share(matrix.out, thread, threads);
        int64_t o = begin;
        if (rows >= tile) {
            for (; o + tile <= end; o += tile) multiply_rows<tile, tile>(matrix, o, to, add);
        }
        for (; o < end; ++o) multiply_rows<1, tile>(matrix, o, to, add);
    }

    // The same for O outputs from `o` on, up to R rows at once.
    template <int O, int R> void multiply_rows(const Matrix &matrix, int64_t o, float *to, bool add) const {
        int64_t row = 0;
        for (; row + R <= rows; row += R) multiply_tile<O, R>(matrix, o, row, to, add);
        for (; row < rows; ++row) multiply_tile<O, 1>(matrix, o, row, to, add);
    }

    template <int O, int R> void multiply_tile(const Matrix &matrix, int64_t output, int64_t row, float *to, bool add) const {
        Product<W> sums[O * R];
        const W *weights = static_cast<const W *>(matrix.weight) + output * matrix.in, *next = weights + O * matrix.in;
        if (O > 1) {  // a part of what the next tiles read, for these several short rows are nothing that the processor would foresee
            constexpr int64_t line = 64 / sizeof(W);
            for (int64_t i = O * matrix.in * row / rows; i < O * matrix.in * (row + R) / rows; i += line) __builtin_prefetch(next + i, 0, 2);
        }
        dots<O, R>(weights, &input.numbers[row * matrix.in], matrix.in, sums);
        for (int64_t o = output, i = 0; o < output + O; ++o) {
            const float scale = matrix.scale ? matrix.scale[o] : 1, bias = matrix.bias ? matrix.bias[o] : 0;
            for (int64_t r = row; r < row + R; ++r, ++i) {
                float &at = to[r * matrix.out + o];
                at = (add ? at : 0) + float(sums[i]) * input.unit(r) * scale + bias;
            }
        }
    }

    void set_normed(const Norm &norm, const float *x) {
        const int64_t width = model.d_model;
        normed.resize(rows * width);
        for (int64_t row = 0; row < rows; ++row) {
            normalise(x + row * width, norm.weight, norm.bias, width, model.rmsnorm, normed.data() + row * width);
        }
        input.set(normed.data(), rows, width);
    }

    // `to` may be `x`.
    void normalise(const float *x, const float *weight, const float *bias, int64_t width, bool rms, float *to) const {
        float mean = 0, variance = 0;
        if (!rms) {
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < width; ++i) mean += x[i];
            mean /= float(width);
        }
#pragma omp simd reduction(+ : variance)
        for (int64_t i = 0; i < width; ++i) variance += (x[i] - mean) * (x[i] - mean);
        const float inverse = 1 / std::sqrt(variance / float(width) + float(model.norm_eps));
        for (int64_t i = 0; i < width; ++i) to[i] = (x[i] - mean) * inverse * weight[i] + (bias ? bias[i] : 0);
    }

    // One head's query or key at its place: normed and turned, where the model does so.
    void prepare(const float *from, const float *norm, int64_t place, float *to) const {
        const int64_t D = model.head_dim, half = model.rotary_dim / 2;
        if (norm) {
            normalise(from, norm, nullptr, D, true, to);
        } else {
            std::copy(from, from + D, to);
        }
        const float *cos = model.cos + place * model.rotary_dim, *sin = model.sin + place * model.rotary_dim;
        for (int64_t i = 0; i < half; ++i) {
            const float first = to[i], second = to[half + i];
            to[i] = first * cos[i] - second * sin[i];
            to[half + i] = second * cos[half + i] + first * sin[half + i];
        }
    }

    // This thread's share of the heads, each with all its keys. qkv (R, (H + 2K) D) -> attended (R, H D).
    void attend(const Block &block, int64_t layer, const Cache &cache, const float *qkv, float *attended) {
        const int64_t H = model.n_head, K = model.n_kv_head, D = model.head_dim, group = H / K;
        const auto [begin, end] = share(rows * H, thread, threads);
        head.resize(2 * D);
        scores.resize(cache.length + 1);
        float *q = head.data(), *k = q + D;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t row = task / H, h = task % H, kv = h / group, first = cache.padding[row], count = cache.length + 1 - first;
            const float *of_row = qkv + row * (H + 2 * K) * D, *v = of_row + (H + K + kv) * D;
            prepare(of_row + h * D, block.q_norm, cache.length - first, q);
            prepare(of_row + (H + kv) * D, block.k_norm, cache.length - first, k);
            const int64_t start = ((row * K + kv) * cache.slots + first) * D, now = (count - 1) * D;
            float *keys = cache.keys[layer] + start, *values = cache.values[layer] + start;
            if (h % group == 0) {  // the others of the group read what is older from the cache, and this from `qkv`
                std::copy(k, k + D, keys + now);
                std::copy(v, v + D, values + now);
            }
            const float scale = 1 / std::sqrt(float(D));
            float largest = -INFINITY, total = 0;
            for (int64_t s = 0; s < count; ++s) {
                scores[s] = dot(s + 1 < count ? keys + s * D : k, q, D) * scale;
                largest = std::max(largest, scores[s]);
            }
            for (int64_t s = 0; s < count; ++s) total += scores[s] = std::exp(scores[s] - largest);
            float *y = attended + task * D;
            for (int64_t d = 0; d < D; ++d) y[d] = scores[count - 1] * v[d];
            int64_t s = 0;
            for (; s + 4 < count; s += 4) {  // several at once, or most of the time goes to storing y and loading it again
                const float *w = &scores[s], *from = values + s * D;
                for (int64_t d = 0; d < D; ++d) y[d] += w[0] * from[d] + w[1] * from[D + d] + w[2] * from[2 * D + d] + w[3] * from[3 * D + d];
            }
            for (; s + 1 < count; ++s) {
                for (int64_t d = 0; d < D; ++d) y[d] += scores[s] * values[s * D + d];
            }
            for (int64_t d = 0; d < D; ++d) y[d] /= total;
        }
    }

    float activate(float x) const {
        switch (model.activation) {
        case GELU: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
        case GELU_TANH: return x / (1 + std::exp(-1.5957691216f * (x + 0.044715f * x * x * x)));  // the tanh, as a sigmoid
        default: return x / (1 + std::exp(-x));
        }
    }

    // This thread's share of what `down` reads, (R, F), of the normed input; `gated` is as large.
    void feed_forward(const Block &block, float *hidden, float *gated) const {
        const bool gates = model.activation == SWIGLU;
        multiply(block.up, hidden);
        if (gates) multiply(block.gate, gated);
        const auto [begin, end] = share(model.d_ff, thread, threads);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = row * model.d_ff + begin; i < row * model.d_ff + end; ++i) {
                hidden[i] = gates ? activate(gated[i]) * hidden[i] : activate(hidden[i]);
            }
        }
    }
};

template <class W> void step(const Model &model, const Cache &cache, const int64_t *tokens, int64_t rows, float *logits, int threads) {
    const int64_t E = model.d_model, H = model.n_head, K = model.n_kv_head, D = model.head_dim, F = model.d_ff;
    std::vector<float> x(rows * E), qkv(rows * (H + 2 * K) * D), attended(rows * H * D), hidden(rows * F), gated(rows * F);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t token = tokens[row], place = cache.length - cache.padding[row];
        for (int64_t i = 0; i < E; ++i) {
            float value = read(model.tokens, model.embedding_type, token * E + i) * float(model.embedding_scale);
            if (model.learned_positions) value += read(model.learned_positions, model.embedding_type, place * E + i);
            if (model.fixed_positions) value += model.fixed_positions[place * E + i];
            x[row * E + i] = value;
        }
    }
#pragma omp parallel num_threads(threads)
    {
        Worker<W> worker{model, omp_get_thread_num(), omp_get_num_threads(), rows};
        for (int64_t layer = 0; layer < model.n_layer; ++layer) {
            const Block &block = model.blocks[layer];
            worker.set_normed(block.attention_norm, x.data());
            worker.multiply(block.qkv, qkv.data());
            if (model.parallel_residual) {
                worker.set_normed(block.feedforward_norm, x.data());
                worker.feed_forward(block, hidden.data(), gated.data());
            }
#pragma omp barrier
            worker.attend(block, layer, cache, qkv.data(), attended.data());
#pragma omp barrier
            worker.input.set(attended.data(), rows, H * D);
            worker.multiply(block.out, x.data(), true);
            if (!model.parallel_residual) {
#pragma omp barrier
                worker.set_normed(block.feedforward_norm, x.data());
                worker.feed_forward(block, hidden.data(), gated.data());
#pragma omp barrier
            }
            worker.input.set(hidden.data(), rows, F);
            worker.multiply(block.down, x.data(), true);
#pragma omp barrier
        }
        worker.set_normed(model.final_norm, x.data());
        worker.multiply(model.head, logits);
    }
}

}  // namespace

// tokens (R,) -> logits (R, V); the caller counts the slot that was filled.
extern "C" void decode_step(const Model *model, const Cache *cache, const int64_t *tokens, int64_t rows, float *logits, int64_t threads) {
    switch (model->weight_type) {
    case FLOAT32: return step<float>(*model, *cache, tokens, rows, logits, int(threads));
    case BFLOAT16: return step<bfloat16>(*model, *cache, tokens, rows, logits, int(threads));
    default: return step<int8_t>(*model, *cache, tokens, rows, logits, int(threads));
    }
}
