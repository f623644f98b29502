// Matrix products of linear layers in bf16 on a CPU with AVX512-BF16, forward and backward: sums in fp32, with what comes before and
// after a product (weights narrowed, biases, GELU and its derivative) done on the way.
//
// A product makes tiles of ROWS x PANEL sums that stay in registers (Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication", 2008). What is read column by column lies in panels of so many columns, pairs down. No sum depends on the number of
// threads.
// `native_library.py` builds and loads this, `native_products.py` calls it.
//
// Shapes: M rows, K what is summed over, N columns; O outputs and I inputs of a layer; but for M all are multiples of 16. `Factors` and
// `Layer` are mirrored in `native_products.py`, field by field.

#include "avx512_bf16.h"

#ifdef GPT_AVX512_BF16

#include <type_traits>
#include <vector>

namespace {

constexpr int64_t ROWS = 6, VECTORS = 4;      // of a tile: with a row of the panel and a pair they fill the registers
constexpr int64_t PANEL = VECTORS * LANES;    // columns
constexpr int64_t CHUNK = 16 * ROWS;          // rows that read a panel while it is in the cache
constexpr int64_t DEPTH = 1024;               // pairs of a panel read at once
constexpr int64_t STRIP = 8 * ROWS;           // columns of a gradient that lie together, for the gradient of a weight
constexpr int64_t TOKENS = 256;               // from which a part of that is summed at once
constexpr int64_t MOST_ROWS = 768, MOST_COLUMNS = 768;  // of the part of it that a thread makes at once

enum class End { PLAIN, GELU, GELU_GRADIENT };

struct Factors {
    const bfloat16 *x;       // (M, K)
    const uint32_t *packed;  // (K, N) in panels
    int64_t K;
};

struct Product {
    const Factors *terms;  // whose products are added up
    int64_t count;
    const float *bias;       // (N,), or null
    bfloat16 *y;             // (M, N)
    bfloat16 *activated;     // (M, N) GELU of y, or of `before`
    const bfloat16 *before;  // (M, N): y is the product times the derivative of GELU there
    int64_t M, N;
};

// Some pairs of one of the terms of a product.
struct Part {
    const Factors *term;
    int64_t first, count;
};

// One of the layers that read the same x.
struct Layer {
    const bfloat16 *gradient;  // (M, O)
    float *of_weight;          // (O, I)
    float *of_bias;            // (O,), or null
    int64_t O;
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
        return _mm512_fmadd_ps(rest, slope, sigmoid);
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

// GELU of a sum, or the sum times GELU's derivative.
template <End END> inline void finish(const Product &p, int64_t at, __m512 sum) {
    const __m256i rounded = narrowed(sum);
    const Gelu gelu(widened(END == End::GELU ? rounded : loaded(p.before + at)));
    store(p.activated + at, narrowed(gelu.value()));
    store(p.y + at, END == End::GELU ? rounded : narrowed(_mm512_mul_ps(widened(rounded), gelu.derivative())));
}

// M rows from `row` on of so many vectors from `column` on: the sum over these parts, and what is in `partial` (M, PANEL) unless they are
// the first; to `partial`, unless they are the last.
template <int M, End END>
void tile(const Product &p, int64_t row, int64_t column, int64_t vectors, const Part *parts, const Part *end, bool is_first, bool is_last,
          float *partial) {
    __m512 sums[M][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < VECTORS; ++n)
            sums[m][n] = !is_first               ? _mm512_loadu_ps(partial + m * PANEL + n * LANES)
                         : p.bias && n < vectors ? _mm512_loadu_ps(p.bias + column + n * LANES)
                                                 : _mm512_setzero_ps();
    if (is_last) {
        const int64_t at = row * p.N + column;
        fetch<M>(p.y + at, p.N, vectors);
        if (END != End::PLAIN) fetch<M>(p.activated + at, p.N, vectors);
        if (END == End::GELU_GRADIENT) fetch<M>(p.before + at, p.N, vectors);
    }
    for (; parts < end; ++parts) {
        const int64_t pairs = parts->term->K / 2;
        const uint32_t *left = reinterpret_cast<const uint32_t *>(parts->term->x) + row * pairs + parts->first;
        add<M, false>(left, pairs, parts->term->packed + column * pairs + parts->first * PANEL, parts->count, sums);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; ++n) {
            if (!is_last || END != End::PLAIN)
                _mm512_storeu_ps(partial + m * PANEL + n * LANES, sums[m][n]);
            else if (n < vectors)
                store(p.y + (row + m) * p.N + column + n * LANES, narrowed(sums[m][n]));
        }
    if (!is_last || END == End::PLAIN) return;
    for (int64_t m = 0; m < M; ++m)  // a loop: as many times the code as there are sums takes longer to fetch than to run
#pragma GCC unroll 4
        for (int64_t n = 0; n < vectors; ++n)
            finish<END>(p, (row + m) * p.N + column + n * LANES, _mm512_loadu_ps(partial + m * PANEL + n * LANES));
}

// f(first row, how many as a constant) for all rows.
template <class F> inline void by_rows(int64_t rows, F f) {
    int64_t m = 0;
    for (; m + ROWS <= rows; m += ROWS) f(m, std::integral_constant<int, ROWS>{});
    for (; m + 2 <= rows; m += 2) f(m, std::integral_constant<int, 2>{});
    if (m < rows) f(m, std::integral_constant<int, 1>{});
}

// A product's parts, in groups of which each is DEPTH pairs long or less: where the groups begin, and the end.
std::vector<int64_t> cut(const Product &p, std::vector<Part> &parts) {
    std::vector<int64_t> groups;
    int64_t depth = DEPTH;
    for (const Factors *term = p.terms; term < p.terms + p.count; ++term)
        for (int64_t first = 0; first < term->K / 2; first += DEPTH) {
            const Part part{term, first, std::min(DEPTH, term->K / 2 - first)};
            if (depth + part.count > DEPTH) groups.push_back(parts.size()), depth = 0;
            depth += part.count;
            parts.push_back(part);
        }
    groups.push_back(parts.size());
    return groups;
}

template <End END> void multiply(const Product &p, int64_t threads) {
    std::vector<Part> parts;
    const std::vector<int64_t> groups = cut(p, parts);
    const int64_t each = rounded_up((p.M + threads - 1) / threads, ROWS), last = groups.size() - 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < p.M; start += each) {
        alignas(64) float partial[CHUNK * PANEL];
        for (int64_t row = start; row < std::min(p.M, start + each); row += CHUNK) {
            const int64_t rows = std::min(CHUNK, std::min(p.M, start + each) - row);
            for (int64_t column = 0; column < p.N; column += PANEL)
                for (int64_t g = 0; g <= last; ++g)
                    by_rows(rows, [&](int64_t m, auto count) {
                        tile<count, END>(p, row + m, column, std::min(VECTORS, (p.N - column) / LANES), &parts[groups[g]],
                                         parts.data() + groups[g + 1], g == 0, g == last, partial + m * PANEL);
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
    int64_t row, tokens, columns, lines, t = 0, c = 0;  // lines: of memory, at each step

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

// M rows of so many vectors of a weight's gradient, in rows of `row` numbers: the sum over pairs of tokens.
template <int M>
void gradient_tile(const uint32_t *strip, const uint32_t *panel, int64_t pairs, float *to, int64_t row, int64_t vectors, bool is_added) {
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

// y = the sum of all x W, and bias.
void multiply(const Factors *terms, int64_t count, const float *bias, bfloat16 *y, int64_t M, int64_t N, int64_t threads) {
    multiply<End::PLAIN>({terms, count, bias, y, nullptr, nullptr, M, N}, threads);
}

// And GELU of it.
void multiply_gelu(const Factors *terms, int64_t count, const float *bias, bfloat16 *y, bfloat16 *activated, int64_t M, int64_t N,
                   int64_t threads) {
    multiply<End::GELU>({terms, count, bias, y, activated, nullptr, M, N}, threads);
}

// y = the sum of all x W times the derivative of GELU at `before`, and GELU there.
void multiply_gelu_gradient(const Factors *terms, int64_t count, const bfloat16 *before, bfloat16 *y, bfloat16 *activated, int64_t M,
                            int64_t N, int64_t threads) {
    multiply<End::GELU_GRADIENT>({terms, count, nullptr, y, activated, before, M, N}, threads);
}

// Of each layer of_weight = gradient transposed times x (M, I), and of_bias the sum of gradient's rows; or += where they are added.
void multiply_transposed(const Layer *layers, int64_t count, const bfloat16 *x, int64_t M, int64_t I, bool is_added, int64_t threads) {
    int64_t outputs = 0, fewest = INT64_MAX;
    for (int64_t n = 0; n < count; ++n) outputs += layers[n].O, fewest = std::min(fewest, layers[n].O);
    // A thread takes a part of the rows of every layer; as many threads as there are should have one, and each as many as the others.
    int64_t row_parts = (outputs + MOST_ROWS - 1) / MOST_ROWS, column_parts = (I + MOST_COLUMNS - 1) / MOST_COLUMNS;
    while (row_parts * column_parts % threads && row_parts < fewest / STRIP) ++row_parts;
    while (row_parts * column_parts < threads && column_parts < I / PANEL) ++column_parts;
    const int64_t columns = rounded_up((I + column_parts - 1) / column_parts, PANEL);
    const auto part_of = [&](const Layer &layer) { return rounded_up((layer.O + row_parts - 1) / row_parts, STRIP); };
    int64_t rows = 0, most = 0;
    for (int64_t n = 0; n < count; ++n) rows += part_of(layers[n]), most = std::max(most, part_of(layers[n]));
#pragma omp parallel num_threads(threads)
    {
        scratch.reset((most + columns) * TOKENS * 2 + 64);
        uint32_t *strips = scratch.take<uint32_t>(most * TOKENS / 2), *panels = scratch.take<uint32_t>(columns * TOKENS / 2);
#pragma omp for collapse(2) schedule(static)
        for (int64_t part = 0; part < row_parts; ++part)
            for (int64_t i = 0; i < I; i += columns) {
                const int64_t width = std::min(columns, I - i), panel_count = (width + PANEL - 1) / PANEL;
                for (int64_t t = 0; t < M; t += TOKENS) {
                    const int64_t tokens = std::min(TOKENS, M - t), pairs = (tokens + 1) / 2, next = t + TOKENS;
                    const int64_t later = std::max<int64_t>(0, std::min(TOKENS, M - next));
                    gather<PANEL>(x + t * I + i, I, tokens, width, panels);
                    Ahead of_x(x + next * I + i, I, later, width, panel_count * (rows / ROWS));
                    for (const Layer *layer = layers; layer < layers + count; ++layer) {
                        const int64_t O = layer->O, o = part * part_of(*layer), height = std::min(part_of(*layer), O - o);
                        if (height <= 0) continue;
                        gather<STRIP>(layer->gradient + t * O + o, O, tokens, height, strips);
                        if (layer->of_bias && i == 0) {
                            if (t == 0 && !is_added) std::fill(layer->of_bias + o, layer->of_bias + o + height, 0.f);
                            add_columns(strips, height, pairs, layer->of_bias + o);
                        }
                        Ahead of_gradient(layer->gradient + next * O + o, O, later, height, panel_count * ((height + ROWS - 1) / ROWS));
                        for (int64_t n = 0; n < width; n += PANEL)
                            by_rows(height, [&](int64_t m, auto size) {
                                of_gradient.step(), of_x.step();
                                gradient_tile<size>(strips + m / STRIP * STRIP * (TOKENS / 2) + m % STRIP, panels + n * (TOKENS / 2), pairs,
                                                    layer->of_weight + (o + m) * I + i + n, I, std::min(VECTORS, (width - n) / LANES),
                                                    is_added || t);
                            });
                    }
                }
            }
    }
}
}

#else

extern "C" int64_t products_are_fast() { return 0; }

#endif
