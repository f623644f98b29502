// What a model does on a CPU with each row by itself, between matrix products in bf16: norms, activations and the loss, forward and backward.
//
// Compilers vectorise these loops for the machine that they are built on; the longest are written out for AVX512-BF16. `native_library.py`
// builds and loads this, `native_rowwise.py` calls it. Products are read and written in bf16, sums between them are in fp32.

#include "avx512_bf16.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifndef GPT_AVX512_BF16
using bfloat16 = uint16_t;
#endif

constexpr int64_t BLOCK = 4096;  // elements, or so, that a thread does at once
constexpr int64_t ROWS = 128;    // whose gradients of weights are added up by themselves, so that the sum does not depend on threads

inline float widened(bfloat16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline bfloat16 narrowed(float x) {  // to the nearest, halves to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}

// e^x to 3e-6 of itself, or 0 where that is below what fp32 holds in full; NaN stays NaN.
inline float exponential(float x) {
    x *= 1.44269504f;
    const bool is_none = x < -126.f;
    x = is_none ? -126.f : x > 126.f ? 126.f : x;
    const float whole = std::rint(x), f = x - whole;
    const float y = 1 + f * (6.9314718e-1f + f * (2.4022651e-1f + f * (5.5504109e-2f + f * (9.6181291e-3f + f * 1.3333558e-3f))));
    const uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return is_none ? 0 : y * power;
}

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

// GELU by its tanh approximation is x sigmoid(slope x + cubic x^3).
constexpr float SLOPE = 1.5957691f, CUBIC = SLOPE * 0.044715f;

template <class Element> inline void blockwise(int64_t n, int64_t threads, Element element) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = std::min(start + BLOCK, n);
#pragma omp simd
        for (int64_t i = start; i < end; ++i) element(i);
    }
}

// A row of logits -> powers e^(logit - peak), peak being the largest; returns their sum.
float powers_of(const bfloat16 *row, int64_t width, float *powers, float *peak) {
    int64_t whole = 0;
    float most = -INFINITY, total = 0;
#ifdef GPT_AVX512_BF16
    whole = width / LANES * LANES;
    __m512 peaks = _mm512_set1_ps(most), totals = _mm512_setzero_ps();
    for (int64_t i = 0; i < whole; i += LANES) peaks = _mm512_max_ps(widened(row + i), peaks);
    most = _mm512_reduce_max_ps(peaks);
#endif
#pragma omp simd reduction(max : most)
    for (int64_t i = whole; i < width; ++i) most = std::max(most, widened(row[i]));
#ifdef GPT_AVX512_BF16
    const __m512 log2_e = _mm512_set1_ps(1.44269504f), shift = _mm512_set1_ps(-1.44269504f * most);
    for (int64_t i = 0; i < whole; i += LANES) {
        const __m512 power = power_of_two(_mm512_fmadd_ps(widened(row + i), log2_e, shift));
        _mm512_storeu_ps(powers + i, power);
        totals = _mm512_add_ps(totals, power);
    }
    total = _mm512_reduce_add_ps(totals);
#endif
#pragma omp simd reduction(+ : total)
    for (int64_t i = whole; i < width; ++i) total += powers[i] = exponential(widened(row[i]) - most);
    *peak = most;
    return total;
}

void scale_row(const float *x, int64_t width, float scale, bfloat16 *y) {
    int64_t whole = 0;
#ifdef GPT_AVX512_BF16
    whole = width / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(y + i, narrowed(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(scale))));
#endif
#pragma omp simd
    for (int64_t i = whole; i < width; ++i) y[i] = narrowed(x[i] * scale);
}

}  // namespace

extern "C" {

// All of n elements.
void gelu_forward(const bfloat16 *x, bfloat16 *y, int64_t n, int64_t threads) {
    blockwise(n, threads, [=](int64_t i) {
        const float v = widened(x[i]);
        y[i] = narrowed(v * sigmoid(v * (SLOPE + CUBIC * v * v)));
    });
}

void gelu_backward(const bfloat16 *x, const bfloat16 *gradient, bfloat16 *result, int64_t n, int64_t threads) {
    blockwise(n, threads, [=](int64_t i) {
        const float v = widened(x[i]), s = sigmoid(v * (SLOPE + CUBIC * v * v));
        result[i] = narrowed(widened(gradient[i]) * s * (1 + v * (1 - s) * (SLOPE + 3 * CUBIC * v * v)));
    });
}

// silu(gate) up, of n elements each.
void swiglu_forward(const bfloat16 *gate, const bfloat16 *up, bfloat16 *y, int64_t n, int64_t threads) {
    blockwise(n, threads, [=](int64_t i) {
        const float g = widened(gate[i]);
        y[i] = narrowed(g * sigmoid(g) * widened(up[i]));
    });
}

void swiglu_backward(const bfloat16 *gate, const bfloat16 *up, const bfloat16 *gradient, bfloat16 *of_gate, bfloat16 *of_up, int64_t n,
                     int64_t threads) {
    blockwise(n, threads, [=](int64_t i) {
        const float g = widened(gate[i]), s = sigmoid(g), d = widened(gradient[i]);
        of_up[i] = narrowed(d * g * s);
        of_gate[i] = narrowed(d * widened(up[i]) * s * (1 + g * (1 - s)));
    });
}

// x += y.
void add_to(float *x, const bfloat16 *y, int64_t n, int64_t threads) {
    blockwise(n, threads, [=](int64_t i) { x[i] += widened(y[i]); });
}

// LayerNorm of rows of `width`, or RMSNorm where it is not `centred`: x fp32, weight and bias (width,) fp32, bias may be null.
void norm_forward(const float *x, const float *weight, const float *bias, double eps, bool centred, bfloat16 *y, float *means, float *scales,
                  int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float *row = x + r * width;
        float sum = 0, squares = 0;
        if (centred)
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) sum += row[i];
        const float mean = sum / width;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += (row[i] - mean) * (row[i] - mean);
        const float scale = 1 / std::sqrt(squares / width + float(eps));
        if (bias)
            for (int64_t i = 0; i < width; ++i) y[r * width + i] = narrowed((row[i] - mean) * scale * weight[i] + bias[i]);
        else
            for (int64_t i = 0; i < width; ++i) y[r * width + i] = narrowed((row[i] - mean) * scale * weight[i]);
        means[r] = mean, scales[r] = scale;
    }
}

void norm_backward(const float *x, const float *weight, const float *means, const float *scales, bool centred, const bfloat16 *gradient,
                   float *of_x, float *of_weight, float *of_bias, int64_t rows, int64_t width, int64_t threads) {
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    std::vector<float> sums(2 * parts * width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
        float *weight_sums = &sums[2 * part * width], *bias_sums = weight_sums + width;
        for (int64_t r = part * ROWS; r < std::min((part + 1) * ROWS, rows); ++r) {
            const float *row = x + r * width, mean = means[r], scale = scales[r];
            const bfloat16 *above = gradient + r * width;
            float *below = of_x + r * width;
            float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
            for (int64_t i = 0; i < width; ++i) {
                const float g = widened(above[i]), normed = (row[i] - mean) * scale;
                weight_sums[i] += g * normed;
                bias_sums[i] += g;
                sum += g * weight[i];
                product += g * weight[i] * normed;
            }
            const float shift = centred ? sum / width : 0, slope = product / width;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i)
                below[i] = scale * (widened(above[i]) * weight[i] - shift - (row[i] - mean) * scale * slope);
        }
    }
    std::fill(of_weight, of_weight + width, 0.f);
    std::fill(of_bias, of_bias + width, 0.f);
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < width; ++i) {
            of_weight[i] += sums[2 * part * width + i];
            of_bias[i] += sums[(2 * part + 1) * width + i];
        }
}

// -log softmax(logits)[target] of each row, 0 where the target is negative; its gradient takes the place of the logits.
void cross_entropy(bfloat16 *logits, const int64_t *targets, float *losses, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(width);
        float *const power = powers.data();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            bfloat16 *row = logits + r * width;
            losses[r] = 0;
            if (targets[r] < 0) {
                std::fill(row, row + width, 0);
                continue;
            }
            float peak;
            const float total = powers_of(row, width, power, &peak);
            losses[r] = std::log(total) + peak - widened(row[targets[r]]);
            const float scale = 1 / total, own = power[targets[r]] * scale - 1;
            scale_row(power, width, scale, row);
            row[targets[r]] = narrowed(own);
        }
    }
}
}
