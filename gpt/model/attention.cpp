// Causal attention in bf16 on a CPU with AVX512-BF16, forward and backward (Dao et al., "FlashAttention", 2022): scores are made in the
// cache, a block of rows at a time, and never leave it.
//
// One thread does all of one key/value head of one sequence, so that results do not depend on the number of threads.
// `native_library.py` builds and loads this, `native_attention.py` calls it; the structs below are mirrored there, field by field.
//
// Shapes: B batch, H query heads, K key/value heads, T tokens, D head_dim, a multiple of 16; P is T rounded up to whole blocks, and W
// the length of a stored row of P columns, which is no power of two, for such rows would share few places of the cache.

#include "avx512_bf16.h"

#ifdef GPT_AVX512_BF16

#include <cmath>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t ROWS = 8;      // that `product` makes at once, two registers wide: 16 sums hide how long one takes
constexpr int64_t COLUMNS = 32;
constexpr int64_t QUERIES = 32;  // a block of forward: all of their scores are kept at once
constexpr int64_t KEYS = 64;     // a block of backward
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

struct Heads {  // (B, heads, T, D) bf16, of which the last dimension lies together; strides in elements
    bfloat16 *data;
    int64_t batch, head, time;

    bfloat16 *row(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * time; }
};

struct Inputs {
    int64_t B, H, K, T, D, threads;
    Heads q, k, v;
    const bfloat16 *mask;  // (B or 1, T, T), added to the scores, or null; in backward key by key, else query by query
    int64_t mask_batch;    // its stride
};

// A matrix in pairs of bf16, and how many there are in a row.
struct Pairs {
    const uint32_t *data;
    int64_t row;
};

Pairs across(const bfloat16 *x, int64_t columns) { return {reinterpret_cast<const uint32_t *>(x), columns / 2}; }

__m512i lanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// Of row `row` of a mask at 16 columns, times log2(e); beyond T it is 0.
__m512 masked(const bfloat16 *mask, int64_t T, int64_t row, int64_t column) {
    const __mmask16 inside = column >= T ? 0 : T - column >= LANES ? 0xffff : (1u << (T - column)) - 1;
    const __m256i values = _mm256_maskz_loadu_epi16(inside, mask + std::min(row, T - 1) * T + column);
    return _mm512_mul_ps(widened(values), _mm512_set1_ps(LOG2_E));
}

// y[column][row] = x[row][column], of pairs; rows a multiple of 16.
void transpose(Pairs x, int64_t rows, int64_t columns, uint32_t *y, int64_t y_row) {
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16) {
            __m512i r[16];
            const int64_t some = std::min<int64_t>(16, columns - j);
            for (int n = 0; n < 16; ++n) r[n] = _mm512_maskz_loadu_epi32((1u << some) - 1, x.data + (i + n) * x.row + j);
            transpose(r);
            for (int64_t n = 0; n < some; ++n) _mm512_storeu_si512(y + (j + n) * y_row + i, r[n]);
        }
}

// One head as rows (P, D), with zeros after the last.
void copy(const Heads &x, int64_t b, int64_t h, int64_t T, int64_t P, int64_t D, bfloat16 *y) {
    for (int64_t t = 0; t < T; ++t) std::memcpy(y + t * D, x.row(b, h, t), D * sizeof(bfloat16));
    std::memset(y + T * D, 0, (P - T) * D * sizeof(bfloat16));
}

// (P, D) -> pairs down (P / 2, D).
void pair_down(const bfloat16 *x, int64_t P, int64_t D, uint32_t *y) {
    for (int64_t t = 0; t < P; t += 2)
        for (int64_t d = 0; d < D; d += LANES) {
            const bfloat16 *at = x + t * D + d;
            _mm512_storeu_si512(y + t / 2 * D + d, interleaved(loaded(at), loaded(at + D)));
        }
}

// c[m][n] += sum over k of a[m][k] b[k][n], k counting pairs, n registers.
template <int M, int N> inline void multiply(Pairs a, Pairs b, int64_t K, __m512 (&c)[M][N]) {
    for (int64_t k = 0; k < K; ++k) {
        __m512bh columns[N];
        for (int n = 0; n < N; ++n) columns[n] = (__m512bh)_mm512_loadu_si512(b.data + k * b.row + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(a.data[m * a.row + k]));
            for (int n = 0; n < N; ++n) c[m][n] = _mm512_dpbf16_ps(c[m][n], pair, columns[n]);
        }
    }
}

template <int N> inline void product_of_width(Pairs a, Pairs b, int64_t K, float *c, int64_t c_row, bool add) {
    __m512 sums[ROWS][N];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
        for (int n = 0; n < N; ++n) sums[m][n] = add ? _mm512_loadu_ps(c + m * c_row + n * LANES) : _mm512_setzero_ps();
    multiply(a, b, K, sums);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
        for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + m * c_row + n * LANES, sums[m][n]);
}

// C = A B, or C += A B: 8 rows of so many columns, a multiple of 16; K pairs.
void product(Pairs a, Pairs b, int64_t K, float *c, int64_t c_row, int64_t columns, bool add = false) {
    int64_t n = 0;
    for (; n + COLUMNS <= columns; n += COLUMNS) product_of_width<2>(a, {b.data + n, b.row}, K, c + n, c_row, add);
    if (n < columns) product_of_width<1>(a, {b.data + n, b.row}, K, c + n, c_row, add);
}

// Scores of one query (seen,) -> its weights, not divided by their sum, which it returns; `logarithm`: log2 of the sum of e^score.
float softmax(float *scores, int64_t seen, int64_t query, const Inputs &in, const bfloat16 *mask, bfloat16 *weights, float *logarithm) {
    const __m512 scale = _mm512_set1_ps(LOG2_E / std::sqrt(float(in.D)));
    __m512 most = _mm512_set1_ps(-INFINITE);
    for (int64_t n = 0; n < seen; n += LANES) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + n), scale);
        if (mask) x = _mm512_add_ps(x, masked(mask, in.T, query, n));
        if (n + LANES > query + 1) {
            const __mmask16 later = _mm512_cmpgt_epi32_mask(lanes(), _mm512_set1_epi32(int(query - n)));
            x = _mm512_mask_mov_ps(x, later, _mm512_set1_ps(-INFINITE));
        }
        _mm512_storeu_ps(scores + n, x);
        most = _mm512_max_ps(most, x);
    }
    const float top = _mm512_reduce_max_ps(most);
    __m512 total = _mm512_setzero_ps();
    for (int64_t n = 0; n < seen; n += LANES) {
        const __m512 x = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + n), _mm512_set1_ps(top)));
        total = _mm512_add_ps(total, x);
        store(weights + n, narrowed(x));
    }
    const float sum = _mm512_reduce_add_ps(total);
    *logarithm = top + std::log2(sum);
    return sum;
}

// All query heads of key/value head g of sequence b.
void forward(const Inputs &in, int64_t b, int64_t g, const Heads &out, float *logarithms) {
    const int64_t T = in.T, D = in.D, P = rounded_up(T, QUERIES), W = P + COLUMNS, group = in.H / in.K;
    const bfloat16 *mask = in.mask ? in.mask + b * in.mask_batch : nullptr;
    scratch.reset(W * D * 8 + QUERIES * (W * 6 + D * 4) + 4096);
    bfloat16 *rows = scratch.take<bfloat16>(P * D), *weights = scratch.take<bfloat16>(QUERIES * W);
    uint32_t *keys = scratch.take<uint32_t>(D / 2 * W), *values = scratch.take<uint32_t>(P / 2 * D);
    float *scores = scratch.take<float>(QUERIES * W), *sums = scratch.take<float>(QUERIES * D);
    copy(in.k, b, g, T, P, D, rows);
    transpose(across(rows, D), P, D / 2, keys, W);
    copy(in.v, b, g, T, P, D, rows);
    pair_down(rows, P, D, values);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        copy(in.q, b, h, T, P, D, rows);
        for (int64_t i = 0; i < T; i += QUERIES) {
            const int64_t seen = i + QUERIES, present = std::min(QUERIES, T - i);
            for (int64_t n = 0; n < seen; n += COLUMNS)
                for (int64_t m = 0; m < QUERIES; m += ROWS)
                    product(across(rows + (i + m) * D, D), {keys + n, W}, D / 2, scores + m * W + n, W, COLUMNS);
            float norms[QUERIES];
            for (int64_t m = 0; m < present; ++m)
                norms[m] = 1 / softmax(scores + m * W, seen, i + m, in, mask, weights + m * W, logarithms + (b * in.H + h) * T + i + m);
            std::memset(weights + present * W, 0, (QUERIES - present) * W * sizeof(bfloat16));
            for (int64_t m = 0; m < QUERIES; m += ROWS) product(across(weights + m * W, W), {values, D}, seen / 2, sums + m * D, D, D);
            for (int64_t m = 0; m < present; ++m)
                for (int64_t d = 0; d < D; d += LANES)
                    store(out.row(b, h, i + m) + d, narrowed(_mm512_mul_ps(_mm512_loadu_ps(sums + m * D + d), _mm512_set1_ps(norms[m]))));
        }
    }
}

// What backward holds of one query head.
struct Queries {
    uint32_t *q_down, *q_across, *gradient_down, *gradient_across;
    float *logarithms, *row_sums;  // (P,): of the softmax; of weights times their gradients
};

void read_queries(const Inputs &in, int64_t b, int64_t h, int64_t P, int64_t W, const Heads &out, const float *logarithms,
                  const Heads &gradient, bfloat16 *rows, const Queries &queries) {
    const int64_t T = in.T, D = in.D;
    copy(in.q, b, h, T, P, D, rows);
    pair_down(rows, P, D, queries.q_down);
    transpose(across(rows, D), P, D / 2, queries.q_across, W);
    copy(gradient, b, h, T, P, D, rows);
    pair_down(rows, P, D, queries.gradient_down);
    transpose(across(rows, D), P, D / 2, queries.gradient_across, W);
    for (int64_t t = 0; t < T; ++t) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += LANES) sum = _mm512_fmadd_ps(widened(out.row(b, h, t) + d), widened(rows + t * D + d), sum);
        queries.row_sums[t] = _mm512_reduce_add_ps(sum);
        queries.logarithms[t] = logarithms[(b * in.H + h) * T + t];
    }
    std::fill(queries.row_sums + T, queries.row_sums + P, 0.f);
    std::fill(queries.logarithms + T, queries.logarithms + P, INFINITE);  // so that their weights are 0
}

// Weights and gradients of scores of 4 keys from `key` on, key by key, for all queries that see them; the latter as pairs down too.
void four_keys(const Inputs &in, int64_t key, int64_t P, int64_t W, const bfloat16 *k, const bfloat16 *v, const Queries &queries,
               const bfloat16 *mask, bfloat16 *weights, bfloat16 *gradients, uint32_t *gradients_down) {
    const int64_t D = in.D;
    const __m512 scale = _mm512_set1_ps(LOG2_E / std::sqrt(float(D)));
    for (int64_t j = key / COLUMNS * COLUMNS; j < P; j += COLUMNS) {
        __m512 scores[4][2] = {}, of_weights[4][2] = {};
        multiply(across(k, D), {queries.q_across + j, W}, D / 2, scores);
        multiply(across(v, D), {queries.gradient_across + j, W}, D / 2, of_weights);
        for (int n = 0; n < 2; ++n) {
            const int64_t query = j + n * LANES;
            const __m512 logarithm = _mm512_loadu_ps(queries.logarithms + query), row_sum = _mm512_loadu_ps(queries.row_sums + query);
            __m256i before = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int m = 0; m < 4; ++m) {
                __m512 x = _mm512_fmsub_ps(scores[m][n], scale, logarithm);
                if (mask) x = _mm512_add_ps(x, masked(mask, in.T, key + m, query));
                x = power_of_two(x);
                if (query < key + 4) x = _mm512_maskz_mov_ps(_mm512_cmpge_epi32_mask(lanes(), _mm512_set1_epi32(int(key + m - query))), x);
                const __m256i gradient = narrowed(_mm512_mul_ps(x, _mm512_sub_ps(of_weights[m][n], row_sum)));
                store(weights + m * W + query, narrowed(x));
                store(gradients + m * W + query, gradient);
                if (m % 2) _mm512_storeu_si512(gradients_down + m / 2 * W + query, interleaved(before, gradient));
                before = gradient;
            }
        }
    }
}

// Gradients of key/value head g of sequence b and of all its query heads.
void backward(const Inputs &in, int64_t b, int64_t g, const Heads &out, const float *logarithms, const Heads &gradient, const Heads &of_q,
              const Heads &of_k, const Heads &of_v) {
    const int64_t T = in.T, D = in.D, P = rounded_up(T, KEYS), W = P + COLUMNS, first = g * (in.H / in.K), end = first + in.H / in.K;
    const float scale = 1 / std::sqrt(float(D));
    const bfloat16 *mask = in.mask ? in.mask + b * in.mask_batch : nullptr;
    scratch.reset(W * D * 28 + W * 8 + KEYS * W * 6 + 4096);
    bfloat16 *rows = scratch.take<bfloat16>(P * D), *k = scratch.take<bfloat16>(P * D), *v = scratch.take<bfloat16>(P * D);
    uint32_t *keys_across = scratch.take<uint32_t>(D * W / 2);
    const Queries queries{scratch.take<uint32_t>(P / 2 * D), scratch.take<uint32_t>(D / 2 * W), scratch.take<uint32_t>(P / 2 * D),
                          scratch.take<uint32_t>(D / 2 * W), scratch.take<float>(P),            scratch.take<float>(P)};
    bfloat16 *weights = scratch.take<bfloat16>(KEYS * W), *of_scores = scratch.take<bfloat16>(KEYS * W);
    uint32_t *of_scores_down = scratch.take<uint32_t>(KEYS / 2 * W);
    float *sums_q = scratch.take<float>(D * W), *sums_k = scratch.take<float>(P * D), *sums_v = scratch.take<float>(P * D);
    copy(in.k, b, g, T, P, D, k);
    copy(in.v, b, g, T, P, D, v);
    pair_down(k, P, D, queries.q_down);  // whose room is free till the first query head
    transpose({queries.q_down, D}, P / 2, D, keys_across, W / 2);  // (D, P) bf16
    for (int64_t h = first; h < end; ++h) {
        read_queries(in, b, h, P, W, out, logarithms, gradient, rows, queries);
        for (int64_t key = 0; key < T; key += KEYS) {
            for (int64_t r = 0; r < KEYS; r += 4)
                four_keys(in, key + r, P, W, k + (key + r) * D, v + (key + r) * D, queries, mask, weights + r * W, of_scores + r * W,
                          of_scores_down + r / 2 * W);
            for (int64_t r = 0; r < KEYS; r += ROWS) {
                const int64_t from = (key + r) / COLUMNS * COLUMNS;  // earlier queries do not see these keys
                const auto add = [&](const bfloat16 *a, const uint32_t *queries_down, float *sums) {
                    product(across(a + r * W + from, W), {queries_down + from / 2 * D, D}, (P - from) / 2, sums + (key + r) * D, D, D,
                            h > first);
                };
                add(weights, queries.gradient_down, sums_v);
                add(of_scores, queries.q_down, sums_k);
            }
            for (int64_t j = key; j < P; j += COLUMNS)
                for (int64_t d = 0; d < D; d += ROWS)
                    product({keys_across + d * (W / 2) + key / 2, W / 2}, {of_scores_down + j, W}, std::min(KEYS, j + COLUMNS - key) / 2,
                            sums_q + d * W + j, W, COLUMNS, key > 0);
        }
        for (int64_t t = 0; t < T; t += LANES)
            for (int64_t d = 0; d < D; d += LANES) {
                __m512i r[16];
                for (int n = 0; n < 16; ++n) r[n] = _mm512_loadu_si512(sums_q + (d + n) * W + t);
                transpose(r);
                for (int64_t n = 0; n < std::min(LANES, T - t); ++n)
                    store(of_q.row(b, h, t + n) + d, narrowed(_mm512_mul_ps(_mm512_castsi512_ps(r[n]), _mm512_set1_ps(scale))));
            }
    }
    for (int64_t t = 0; t < T; ++t)
        for (int64_t d = 0; d < D; d += LANES) {
            store(of_k.row(b, g, t) + d, narrowed(_mm512_mul_ps(_mm512_loadu_ps(sums_k + t * D + d), _mm512_set1_ps(scale))));
            store(of_v.row(b, g, t) + d, narrowed(_mm512_loadu_ps(sums_v + t * D + d)));
        }
}

}  // namespace

extern "C" {

int64_t attention_is_fast() { return 1; }

// logarithms: (B, H, T) fp32, log2 of the sum of e^score over the keys that a query sees.
void attention_forward(const Inputs *in, const Heads *out, float *logarithms) {
#pragma omp parallel for collapse(2) num_threads(in->threads) schedule(static)
    for (int64_t b = 0; b < in->B; ++b)
        for (int64_t g = 0; g < in->K; ++g) forward(*in, b, g, *out, logarithms);
}

void attention_backward(const Inputs *in, const Heads *out, const float *logarithms, const Heads *gradient, const Heads *of_q,
                        const Heads *of_k, const Heads *of_v) {
#pragma omp parallel for collapse(2) num_threads(in->threads) schedule(static)
    for (int64_t b = 0; b < in->B; ++b)
        for (int64_t g = 0; g < in->K; ++g) backward(*in, b, g, *out, logarithms, *gradient, *of_q, *of_k, *of_v);
}
}

#else

extern "C" int64_t attention_is_fast() { return 0; }

#endif
