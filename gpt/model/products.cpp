// Matrix products of linear layers in bf16 on a CPU with AVX512-BF16, forward and backward: sums in fp32, with what comes before and after a
// product (weights narrowed, biases, GELU and its derivative) done on the way.
//
// A product makes tiles of ROWS x PANEL sums that stay in registers (Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication", 2008). What is read column by column lies in panels of so many columns, pairs down. No sum depends on the number of threads.
// `native_library.py` builds and loads this, `native_products.py` calls it.
//
// Shapes: M rows, K what is summed over, N columns; O outputs and I inputs of a layer; but for M all are multiples of 16.

#include "avx512_bf16.h"

#ifdef GPT_AVX512_BF16

#include <type_traits>

namespace {

constexpr int64_t ROWS = 6, VECTORS = 4;      // of a tile: with a row of the panel and a pair they fill the registers
constexpr int64_t PANEL = VECTORS * LANES;    // columns
constexpr int64_t CHUNK = 16 * ROWS;          // rows that read a panel while it is in the cache
constexpr int64_t DEPTH = 1024;               // pairs of a panel read at once
constexpr int64_t STRIP = 8 * ROWS;           // columns of a gradient that lie together, for the gradient of a weight
constexpr int64_t TOKENS = 256;               // from which a part of that is summed at once
constexpr int64_t MOST_ROWS = 768, MOST_COLUMNS = 768;  // of the part of it that a thread makes at once

enum class End { PLAIN, GELU, GELU_GRADIENT };

struct Product {
    const bfloat16 *x;       // (M, K)
    const uint32_t *packed;  // (K, N) in panels
    const float *bias;       // (N,), or null
    bfloat16 *y;             // (M, N)
    bfloat16 *activated;     // (M, N) GELU of y, or of `before`
    const bfloat16 *before;  // (M, N): y is the product times the derivative of GELU there
    int64_t M, K, N;
};

// GELU by its tanh approximation is x sigmoid(slope x + cubic x^3). Results are rounded to bf16, so a quotient to 2^-14 is enough.
struct Gelu {
    static constexpr float SLOPE = 1.5957691f, CUBIC = SLOPE * 0.044715f, LOG2_E = 1.44269504f;
    __m512 x, square, sigmoid;

    explicit Gelu(__m512 x) : x(x), square(_mm512_mul_ps(x, x)) {
        const __m512 slope = _mm512_fmadd_ps(square, _mm512_set1_ps(-CUBIC * LOG2_E), _mm512_set1_ps(-SLOPE * LOG2_E));
        sigmoid = _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), power_of_two(_mm512_mul_ps(x, slope))));
    }
    __m512 value() const { return _mm512_mul_ps(x, sigmoid); }
    __m512 derivative() const {  // sigmoid (1 + x (1 - sigmoid) (slope + 3 cubic x^2))
        const __m512 slope = _mm512_fmadd_ps(square, _mm512_set1_ps(3 * CUBIC), _mm512_set1_ps(SLOPE));
        const __m512 rest = _mm512_fnmadd_ps(value(), sigmoid, value());
        return _mm512_fmadd_ps(_mm512_mul_ps(rest, slope), sigmoid, sigmoid);
    }
};

__m256i narrow(const float *x) { return narrowed(_mm512_loadu_ps(x)); }
__m256i narrow(const bfloat16 *x) { return loaded(x); }

// sums[m][n] += sum over k of left[m][k] right[k][n], of K pairs. left lies row by row, or as strips do.
template <int M, bool IS_STRIP>
inline void add(const uint32_t *left, int64_t row, const uint32_t *right, int64_t K, __m512 (&sums)[M][VECTORS]) {
    for (int64_t k = 0; k < K; ++k) {
        __m512bh columns[VECTORS];
        for (int n = 0; n < VECTORS; ++n) columns[n] = (__m512bh)_mm512_loadu_si512(right + k * PANEL + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(IS_STRIP ? left[k * STRIP + m] : left[m * row + k]));
            for (int n = 0; n < VECTORS; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], pair, columns[n]);
        }
    }
}

// Has lines of memory come while sums are made, those that a tile will write (or read) at the end.
template <int M> inline void fetch(const bfloat16 *x, int64_t row, int64_t vectors) {
    for (int m = 0; m < M; ++m)
        for (int64_t n = 0; n < vectors; n += 2) __builtin_prefetch(x + m * row + n * LANES, 1);
}

template <End END> inline void finish(const Product &p, int64_t at, __m512 sum) {
    if (END == End::GELU_GRADIENT) {
        const Gelu gelu(widened(p.before + at));
        store(p.activated + at, narrowed(gelu.value()));
        store(p.y + at, narrowed(_mm512_mul_ps(widened(narrowed(sum)), gelu.derivative())));
        return;
    }
    store(p.y + at, narrowed(sum));
    if (END == End::GELU) store(p.activated + at, narrowed(Gelu(widened(narrowed(sum))).value()));
}

// M rows from `row` on of so many vectors from `column` on. Where K is deep, sums wait in `partial` (M, PANEL) from one call to the next.
template <int M, End END> void tile(const Product &p, int64_t row, int64_t column, int64_t vectors, int64_t depth, float *partial) {
    const int64_t pairs = p.K / 2, end = std::min(depth + DEPTH, pairs);
    __m512 sums[M][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < VECTORS; ++n)
            sums[m][n] = depth                     ? _mm512_loadu_ps(partial + m * PANEL + n * LANES)
                         : p.bias && n < vectors ? _mm512_loadu_ps(p.bias + column + n * LANES)
                                                   : _mm512_setzero_ps();
    if (end == pairs) {
        const int64_t at = row * p.N + column;
        fetch<M>(p.y + at, p.N, vectors);
        if (END != End::PLAIN) fetch<M>(p.activated + at, p.N, vectors);
        if (END == End::GELU_GRADIENT) fetch<M>(p.before + at, p.N, vectors);
    }
    const uint32_t *left = reinterpret_cast<const uint32_t *>(p.x) + row * pairs;
    add<M, false>(left + depth, pairs, p.packed + column * pairs + depth * PANEL, end - depth, sums);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; ++n) {
            if (end < pairs)
                _mm512_storeu_ps(partial + m * PANEL + n * LANES, sums[m][n]);
            else if (n < vectors)
                finish<END>(p, (row + m) * p.N + column + n * LANES, sums[m][n]);
        }
}

// f(first row, how many as a constant) for all rows.
template <class F> inline void by_rows(int64_t rows, F f) {
    int64_t m = 0;
    for (; m + ROWS <= rows; m += ROWS) f(m, std::integral_constant<int, ROWS>{});
    switch (rows - m) {
        case 1: return f(m, std::integral_constant<int, 1>{});
        case 2: return f(m, std::integral_constant<int, 2>{});
        case 3: return f(m, std::integral_constant<int, 3>{});
        case 4: return f(m, std::integral_constant<int, 4>{});
        case 5: return f(m, std::integral_constant<int, 5>{});
    }
}

template <End END> void multiply(const Product &p, int64_t threads) {
    const int64_t each = rounded_up((p.M + threads - 1) / threads, ROWS);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < p.M; start += each) {
        alignas(64) float partial[CHUNK * PANEL];
        for (int64_t row = start; row < std::min(p.M, start + each); row += CHUNK) {
            const int64_t rows = std::min(CHUNK, std::min(p.M, start + each) - row);
            for (int64_t column = 0; column < p.N; column += PANEL)
                for (int64_t depth = 0; depth < p.K / 2; depth += DEPTH)
                    by_rows(rows, [&](int64_t m, auto count) {
                        tile<count, END>(p, row + m, column, std::min(VECTORS, (p.N - column) / LANES), depth, partial + m * PANEL);
                    });
        }
    }
}

template <class Number> void pack_rows(const Number *weight, int64_t O, int64_t I, uint32_t *packed, int64_t threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < O; panel += PANEL)
        for (int64_t o = 0; o < PANEL; o += LANES)
            for (int64_t i = 0; i < I; i += 2 * LANES) {
                const int64_t pairs = std::min(LANES, (I - i) / 2);
                __m512i r[16];
                for (int64_t n = 0; n < LANES; ++n) {
                    const Number *at = weight + (panel + o + n) * I + i;
                    r[n] = _mm512_setzero_si512();
                    if (panel + o < O) r[n] = _mm512_zextsi256_si512(narrow(at));
                    if (panel + o < O && pairs == LANES) r[n] = _mm512_inserti64x4(r[n], narrow(at + LANES), 1);
                }
                transpose(r);
                for (int64_t n = 0; n < pairs; ++n) _mm512_storeu_si512(packed + panel * I / 2 + (i / 2 + n) * PANEL + o, r[n]);
            }
}

template <class Number> void pack_columns(const Number *weight, int64_t O, int64_t I, uint32_t *packed, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < I; panel += PANEL)
        for (int64_t o = 0; o < O; o += 2)
            for (int64_t n = 0; n < PANEL; n += LANES) {
                const Number *at = weight + o * I + panel + n;
                const __m512i pairs = panel + n < I ? interleaved(narrow(at), narrow(at + I)) : _mm512_setzero_si512();
                _mm512_storeu_si512(packed + panel * O / 2 + o / 2 * PANEL + n, pairs);
            }
}

// Columns (tokens, columns) of longer rows -> strips or panels of WIDTH columns, pairs down, with zeros where there are none.
template <int64_t WIDTH> void gather(const bfloat16 *x, int64_t row, int64_t tokens, int64_t columns, uint32_t *to) {
    for (int64_t t = 0; t < tokens; t += 2) {
        const bfloat16 *upper = x + t * row, *lower = upper + row;
        const bool both = t + 1 < tokens;
        for (int64_t c = 0; c < columns; c += WIDTH) {
            uint32_t *out = to + c * (TOKENS / 2) + t / 2 * WIDTH;
            const int64_t some = std::min(WIDTH, columns - c);
            for (int64_t n = 0; n < WIDTH; n += 2 * LANES) {
                __builtin_prefetch(upper + 8 * row + c + n);
                __builtin_prefetch(lower + 8 * row + c + n);
            }
#pragma GCC unroll 8
            for (int64_t n = 0; n < WIDTH; n += LANES) {
                __m512i pairs = _mm512_setzero_si512();
                if (n < some) pairs = interleaved(loaded(upper + c + n), both ? loaded(lower + c + n) : _mm256_setzero_si256());
                _mm512_storeu_si512(out + n, pairs);
            }
        }
    }
}

// Has a part (tokens, columns) of longer rows come nearer, a little at each step, while something else is computed.
struct Ahead {
    const bfloat16 *x;
    int64_t row, tokens, columns, lines, t = 0, c = 0;  // lines of memory at each step

    Ahead(const bfloat16 *x, int64_t row, int64_t tokens, int64_t columns, int64_t steps)
        : x(x), row(row), tokens(tokens), columns(columns), lines((tokens * ((columns + 31) / 32) + steps - 1) / steps) {}

    void step() {
        for (int64_t i = 0; i < lines && t < tokens; ++i) {
            __builtin_prefetch(x + t * row + c, 0, 2);
            if ((c += 32) >= columns) c = 0, ++t;
        }
    }
};

// sums (columns,) += those of the strips.
void add_columns(const uint32_t *strips, int64_t columns, int64_t pairs, float *sums) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t c = 0; c < columns; c += LANES) {
        const uint32_t *at = strips + c / STRIP * STRIP * (TOKENS / 2) + c % STRIP;
        __m512 sum = _mm512_loadu_ps(sums + c);
        for (int64_t k = 0; k < pairs; ++k) sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(at + k * STRIP), ones);
        _mm512_storeu_ps(sums + c, sum);
    }
}

template <int M> void gradient_tile(const uint32_t *strip, const uint32_t *panel, int64_t pairs, float *to, int64_t row, int64_t vectors, bool is_added) {
    __m512 sums[M][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < VECTORS; ++n) {
            sums[m][n] = _mm512_setzero_ps();
            if (n < vectors) _mm_prefetch(reinterpret_cast<const char *>(to + m * row + n * LANES), _MM_HINT_T0);
        }
    add<M, true>(strip, 0, panel, pairs, sums);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; ++n)
            if (n < vectors) {
                float *at = to + m * row + n * LANES;
                _mm512_storeu_ps(at, is_added ? _mm512_add_ps(_mm512_loadu_ps(at), sums[m][n]) : sums[m][n]);
            }
}

}  // namespace

extern "C" {

int64_t products_are_fast() { return 1; }

// A weight (O, I), fp32 if `is_wide` or bf16, for products with rows of I numbers: of O / 64 panels rounded up, I / 2 x 64 pairs each.
void pack_for_forward(const void *weight, bool is_wide, int64_t O, int64_t I, uint32_t *packed, int64_t threads) {
    is_wide ? pack_rows(static_cast<const float *>(weight), O, I, packed, threads)
            : pack_rows(static_cast<const bfloat16 *>(weight), O, I, packed, threads);
}

// The same, for products with rows of O numbers: of I / 64 panels rounded up, O / 2 x 64 pairs each.
void pack_for_backward(const void *weight, bool is_wide, int64_t O, int64_t I, uint32_t *packed, int64_t threads) {
    is_wide ? pack_columns(static_cast<const float *>(weight), O, I, packed, threads)
            : pack_columns(static_cast<const bfloat16 *>(weight), O, I, packed, threads);
}

// y = x W + bias.
void multiply(const bfloat16 *x, const uint32_t *packed, const float *bias, bfloat16 *y, int64_t M, int64_t K, int64_t N, int64_t threads) {
    multiply<End::PLAIN>({x, packed, bias, y, nullptr, nullptr, M, K, N}, threads);
}

// And GELU of it.
void multiply_gelu(const bfloat16 *x, const uint32_t *packed, const float *bias, bfloat16 *y, bfloat16 *activated, int64_t M, int64_t K,
                   int64_t N, int64_t threads) {
    multiply<End::GELU>({x, packed, bias, y, activated, nullptr, M, K, N}, threads);
}

// y = x W times the derivative of GELU at `before`, and GELU there.
void multiply_gelu_gradient(const bfloat16 *x, const uint32_t *packed, const bfloat16 *before, bfloat16 *y, bfloat16 *activated, int64_t M,
                            int64_t K, int64_t N, int64_t threads) {
    multiply<End::GELU_GRADIENT>({x, packed, nullptr, y, activated, before, M, K, N}, threads);
}

// of_weight (O, I) = gradient (M, O) transposed times x (M, I), or += where it is added; of_bias (O,), or null, likewise.
void multiply_transposed(const bfloat16 *gradient, const bfloat16 *x, float *of_weight, float *of_bias, int64_t M, int64_t O, int64_t I,
                         bool is_added, int64_t threads) {
    int64_t row_parts = (O + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t column_parts = (I + MOST_COLUMNS - 1) / MOST_COLUMNS, columns = rounded_up((I + column_parts - 1) / column_parts, PANEL);
    while (row_parts * column_parts % threads && row_parts < O / STRIP) ++row_parts;
    const int64_t rows = rounded_up((O + row_parts - 1) / row_parts, STRIP);
#pragma omp parallel num_threads(threads)
    {
        scratch.reset((rows + columns) * TOKENS * 2 + 64);
        uint32_t *strips = scratch.take<uint32_t>(rows * TOKENS / 2), *panels = scratch.take<uint32_t>(columns * TOKENS / 2);
#pragma omp for collapse(2) schedule(static)
        for (int64_t o = 0; o < O; o += rows)
            for (int64_t i = 0; i < I; i += columns) {
                const int64_t height = std::min(rows, O - o), width = std::min(columns, I - i);
                if (of_bias && i == 0 && !is_added) std::fill(of_bias + o, of_bias + o + height, 0.f);
                for (int64_t t = 0; t < M; t += TOKENS) {
                    const int64_t tokens = std::min(TOKENS, M - t), pairs = (tokens + 1) / 2;
                    gather<STRIP>(gradient + t * O + o, O, tokens, height, strips);
                    gather<PANEL>(x + t * I + i, I, tokens, width, panels);
                    if (of_bias && i == 0) add_columns(strips, height, pairs, of_bias + o);
                    const int64_t next = t + TOKENS, later = std::max<int64_t>(0, std::min(TOKENS, M - next));
                    const int64_t tiles = (height + ROWS - 1) / ROWS * ((width + PANEL - 1) / PANEL);
                    Ahead of_gradient(gradient + next * O + o, O, later, height, tiles), of_x(x + next * I + i, I, later, width, tiles);
                    for (int64_t n = 0; n < width; n += PANEL)
                        by_rows(height, [&](int64_t m, auto count) {
                            of_gradient.step(), of_x.step();
                            gradient_tile<count>(strips + m / STRIP * STRIP * (TOKENS / 2) + m % STRIP, panels + n * (TOKENS / 2), pairs,
                                                 of_weight + (o + m) * I + i + n, I, std::min(VECTORS, (width - n) / LANES), is_added || t);
                        });
                }
            }
    }
}
}

#else

extern "C" int64_t products_are_fast() { return 0; }

#endif
