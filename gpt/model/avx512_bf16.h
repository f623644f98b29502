// What our C++ for CPUs with AVX512-BF16 shares: numbers of 16 bits in registers of 512, and memory for each thread.
//
// The instruction multiplies pairs of bf16: C += A B takes A row by row, two neighbours of a row at once, and B as "pairs down", two rows
// at a column in 32 bits. What is "across" is transposed on the way, so that two columns at a row are such a pair.

#pragma once

#include <cstdint>

// Where there are matrix units (AMX) torch's products use them, and ours would not.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#define GPT_AVX512_BF16 1

#include <immintrin.h>

#include <algorithm>
#include <cstdlib>

namespace {

using bfloat16 = uint16_t;

constexpr int64_t LANES = 16;  // fp32 in a register

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory of a thread, kept from call to call.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }

    // Room for so many bytes; what was taken before is gone.
    void reset(int64_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        std::free(data_);
        size_ = (bytes + 4095) / 4096 * 4096;
        data_ = static_cast<char *>(std::aligned_alloc(4096, size_));
        if (!data_) std::abort();  // there is no way to throw out of a parallel region
    }

    template <class T> T *take(int64_t n) {
        T *result = reinterpret_cast<T *>(data_ + used_);
        used_ += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
        if (used_ > size_) std::abort();
        return result;
    }

  private:
    char *data_ = nullptr;
    int64_t size_ = 0, used_ = 0;
};
thread_local Scratch scratch;

inline __m256i loaded(const bfloat16 *x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)); }

inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m512 widened(const bfloat16 *x) { return widened(loaded(x)); }

inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline void store(bfloat16 *x, __m256i values) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(x), values); }

// Two rows as pairs down.
inline __m512i interleaved(__m256i upper, __m256i lower) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(upper), _mm512_slli_epi32(_mm512_cvtepu16_epi32(lower), 16));
}

// 2^x to fp32's rounding by a polynomial; NaN stays NaN, -infinity gives 0.
inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);  // the second operand is what comes back where either is NaN
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(1.3333558146428443e-3f);  // log(2)^i / i!
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291076284772e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504108664821580e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022650695910072e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718055994531e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(y, n);
}

// 16 rows of 16 numbers of 32 bits.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace

#endif
