// Products of register tiles, in which every number has a chain of fused multiply-adds of its own.
#pragma once

#include <cstdint>

#include "simd.h"

namespace chunkcache {

using simd::Floats;
using simd::kColumns;
using simd::kRows;
using simd::kWidth;

constexpr int kPanel = kColumns * kWidth;  // columns that lie together once they are turned over

// What one step along the depth of a product multiplies: a float, or a pair of bfloat16.
struct Single {
  using Unit = float;
  using Row = Floats;
  static Row spread(Unit x) { return simd::all(x); }
  static Row load(const Unit* p) { return simd::load(p); }
  static Floats multiply_add(Row a, Row b, Floats c) { return simd::fma(a, b, c); }
};

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
struct Pair {
  using Unit = uint32_t;
  using Row = __m512i;
  static Row spread(Unit x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Row load(const Unit* p) { return _mm512_loadu_si512(p); }
  static Floats multiply_add(Row a, Row b, Floats c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};
#else
constexpr bool kPairs = false;
using Pair = Single;
#endif

// c = c * scale + a b for R rows of a and C vectors of columns; without scale, c = a b. Not inlined: among
// other code the compiler finds no registers for b, which costs a fifth of the time.
template <class Op, int R, int C>
[[gnu::noinline]] void tile(const typename Op::Unit* a, int64_t lda, const typename Op::Unit* b, int ldb, int depth,
                 float* c, int64_t ldc, const float* scale) {
  Floats sum[R][C];
  UNROLL for (int r = 0; r < R; ++r) {
    const Floats factor = simd::all(scale ? scale[r] : 0.0f);
    UNROLL for (int j = 0; j < C; ++j)
      sum[r][j] = scale ? simd::mul(simd::load(c + r * ldc + j * kWidth), factor) : simd::all(0.0f);
  }
  for (int k = 0; k < depth; ++k, b += ldb) {
    typename Op::Row row[C];
    UNROLL for (int j = 0; j < C; ++j) row[j] = Op::load(b + j * kWidth);
    UNROLL for (int r = 0; r < R; ++r) {
      const typename Op::Row x = Op::spread(a[r * lda + k]);
      UNROLL for (int j = 0; j < C; ++j) sum[r][j] = Op::multiply_add(x, row[j], sum[r][j]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int j = 0; j < C; ++j) simd::store(c + r * ldc + j * kWidth, sum[r][j]);
}

template <class Op, int R>
inline void product(const typename Op::Unit* a, int64_t lda, const typename Op::Unit* b, int ldb, int depth,
                    int columns, float* c, int64_t ldc, const float* scale) {
  int vectors = columns / kWidth, j = 0;
  for (; j + kColumns <= vectors; j += kColumns)
    tile<Op, R, kColumns>(a, lda, b + j * kWidth, ldb, depth, c + j * kWidth, ldc, scale);
  for (; j < vectors; ++j) tile<Op, R, 1>(a, lda, b + j * kWidth, ldb, depth, c + j * kWidth, ldc, scale);
}

// The product of the first min(rows, kRows) rows.
template <class Op>
inline void rows_product(int rows, const typename Op::Unit* a, int64_t lda, const typename Op::Unit* b, int ldb,
                         int depth, int columns, float* c, int64_t ldc, const float* scale) {
  switch (rows) {
    case 1: product<Op, 1>(a, lda, b, ldb, depth, columns, c, ldc, scale); break;
    case 2: product<Op, 2>(a, lda, b, ldb, depth, columns, c, ldc, scale); break;
    case 3: product<Op, 3>(a, lda, b, ldb, depth, columns, c, ldc, scale); break;
    case 4: product<Op, 4>(a, lda, b, ldb, depth, columns, c, ldc, scale); break;
    case 5: product<Op, 5>(a, lda, b, ldb, depth, columns, c, ldc, scale); break;
    default: product<Op, kRows>(a, lda, b, ldb, depth, columns, c, ldc, scale);
  }
}

}  // namespace chunkcache
