// Vectors of floats, and squares of numbers, in two instruction sets, chosen by the compiler's flags.
//
// Everything that decides bits is explicit here: fused multiply-add is written where it is meant, and
// each lane sees its operations in the same order whatever the shape of the tile around it.
#pragma once

#include <cstdint>
#include <immintrin.h>

#define UNROLL _Pragma("GCC unroll 16")  // without it tiles live in memory, not in registers

namespace chunkcache::simd {

#if defined(__AVX512F__)

using Floats = __m512;
constexpr int kWidth = 16;    // floats per vector
constexpr int kColumns = 4;   // vectors per row of a register tile
constexpr int kRows = 6;      // rows of a register tile

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats size(Floats x) { return _mm512_abs_ps(x); }
inline Floats round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }

// The first `count` lanes of x (none if negative, at most all), `other` behind them.
inline Floats first(int count, Floats x, Floats other) {
  unsigned mask = count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u;
  return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), other, x);
}

// x with the sign of another; and which of two where a size is below a limit.
inline Floats with_sign(Floats x, Floats other) {
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(other), _mm512_castps_si512(x), 0xca));
}
inline Floats choose(Floats size, Floats limit, Floats below, Floats above) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(size, limit, _CMP_LT_OQ), above, below);
}

inline Floats from_bfloat16(const uint16_t* p) {
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline Floats from_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// A square of kWidth x kWidth numbers of 32 bits, rows `from_stride` and `to_stride` apart, mirrored.
template <class Unit>
inline void transpose(const Unit* from, int64_t from_stride, Unit* to, int64_t to_stride) {
  __m512i a[16], b[16];
  UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  UNROLL for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {  // then a[i + j] holds columns j, j + 4, ... of four rows
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    const __m512i top = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88), high = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
    const __m512i low = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
    const __m512i last = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
    _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(top, low, 0x88));
    _mm512_storeu_si512(to + (j + 4) * to_stride, _mm512_shuffle_i32x4(high, last, 0x88));
    _mm512_storeu_si512(to + (j + 8) * to_stride, _mm512_shuffle_i32x4(top, low, 0xdd));
    _mm512_storeu_si512(to + (j + 12) * to_stride, _mm512_shuffle_i32x4(high, last, 0xdd));
  }
}

#else  // AVX2, FMA, F16C

using Floats = __m256;
constexpr int kWidth = 8;
constexpr int kColumns = 2;
constexpr int kRows = 6;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats size(Floats x) { return _mm256_andnot_ps(all(-0.0f), x); }
inline Floats round(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// x * 2^n for n up to 127; zero where the power is no normal number.
inline Floats times_power(Floats x, Floats n) {
  Floats alive = _mm256_cmp_ps(n, all(-126.0f), _CMP_NLT_UQ);
  __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(alive, mul(x, _mm256_castsi256_ps(power)));
}
inline float largest(Floats x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline Floats first(int count, Floats x, Floats other) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(mask));
}
inline Floats with_sign(Floats x, Floats other) {
  return _mm256_blendv_ps(size(x), _mm256_or_ps(x, all(-0.0f)), other);
}
inline Floats choose(Floats size, Floats limit, Floats below, Floats above) {
  return _mm256_blendv_ps(above, below, _mm256_cmp_ps(size, limit, _CMP_LT_OQ));
}
inline Floats from_bfloat16(const uint16_t* p) {
  __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline Floats from_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <class Unit>
inline void transpose(const Unit* from, int64_t from_stride, Unit* to, int64_t to_stride) {
  Floats a[8], b[8];
  UNROLL for (int i = 0; i < 8; ++i) a[i] = load(reinterpret_cast<const float*>(from + i * from_stride));
  UNROLL for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {  // then a[i + j] holds columns j and j + 4 of four rows
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    store(reinterpret_cast<float*>(to + j * to_stride), _mm256_permute2f128_ps(a[j], a[j + 4], 0x20));
    store(reinterpret_cast<float*>(to + (j + 4) * to_stride), _mm256_permute2f128_ps(a[j], a[j + 4], 0x31));
  }
}

#endif

// 2^x for finite x <= 0, relative error below 2e-7; zero from -150 down.
inline Floats exp2(Floats x) {
  Floats n = round(x);
  Floats f = sub(x, n);  // from -1/2 to 1/2, exact
  Floats p = all(0.001326472731307149f);  // the minimax polynomial with p(0) = 1
  p = fma(p, f, all(0.009671512991189957f));
  p = fma(p, f, all(0.05550733581185341f));
  p = fma(p, f, all(0.24022242426872253f));
  p = fma(p, f, all(0.6931470036506653f));
  p = fma(p, f, all(1.0f));
  return times_power(p, n);
}

// tanh x, absolute error below 1.4e-7, relative below 2.5e-7, monotone; not a number stays none.
inline Floats tanh(Floats x) {
  const Floats limit = all(0.625f), far = min(all(20.0f), size(x));  // beyond it is 1
  const Floats e = exp2(mul(far, all(-2.88539008177792681f)));       // exp(-2 |x|)
  const Floats above = div(sub(all(1.0f), e), add(all(1.0f), e));
  const Floats square = mul(far, far);  // near 0 that would lose all digits: an odd polynomial (Cephes)
  Floats p = all(-5.70498872745e-3f);
  p = fma(p, square, all(2.06390887954e-2f));
  p = fma(p, square, all(-5.37397155531e-2f));
  p = fma(p, square, all(1.33314422036e-1f));
  p = fma(p, square, all(-3.33332819422e-1f));
  const Floats below = fma(mul(p, square), far, far);
  return with_sign(choose(far, limit, below, above), x);
}

// The sum of all lanes, always in the same order.
inline float sum(Floats x) {
  float lanes[kWidth];
  store(lanes, x);
  for (int width = kWidth / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace chunkcache::simd
