// Matrices copied to other places, as they are or turned over.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace chunkcache {

// A square of 8 x 8 numbers of 16 bits, mirrored.
inline void mirror_square(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
  __m128i a[8], b[8];
  UNROLL for (int i = 0; i < 8; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
  UNROLL for (int i = 0; i < 8; i += 2) {
    b[i] = _mm_unpacklo_epi16(a[i], a[i + 1]);
    b[i + 1] = _mm_unpackhi_epi16(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {  // then a[i + j] holds columns 2j and 2j + 1 of four rows
    a[i] = _mm_unpacklo_epi32(b[i], b[i + 2]);
    a[i + 1] = _mm_unpackhi_epi32(b[i], b[i + 2]);
    a[i + 2] = _mm_unpacklo_epi32(b[i + 1], b[i + 3]);
    a[i + 3] = _mm_unpackhi_epi32(b[i + 1], b[i + 3]);
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    auto* line = reinterpret_cast<__m128i*>(to + 2 * j * to_stride);
    _mm_storeu_si128(line, _mm_unpacklo_epi64(a[j], a[j + 4]));
    line = reinterpret_cast<__m128i*>(to + (2 * j + 1) * to_stride);
    _mm_storeu_si128(line, _mm_unpackhi_epi64(a[j], a[j + 4]));
  }
}
inline void mirror_square(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  simd::transpose(from, from_stride, to, to_stride);
}

// [rows, columns] as [columns, rows].
template <class Unit, int kSide>
void turn(const Unit* from, int64_t rows, int64_t columns, Unit* to) {
  const int64_t below = rows / kSide * kSide, right = columns / kSide * kSide;  // where the squares end
  for (int64_t i = 0; i < below; i += kSide)
    for (int64_t j = 0; j < right; j += kSide) mirror_square(from + i * columns + j, columns, to + j * rows + i, rows);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < below ? right : 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
}

// Stacks of matrices [layers][matrices][rows, columns] of numbers of `size` bytes, 2 or 4 if they are
// turned over; layers lie strides apart, in bytes, and what is in one of them without gaps.
struct Copies {
  struct Pair {
    const char* from;
    char* to;
  };

  int size, turned;
  int64_t layers, matrices, rows, columns, from_stride, to_stride;
  const Pair* pairs;
  int64_t count;

  void copy() const {
    for (const Pair* pair = pairs; pair < pairs + count; ++pair)
      for (int64_t layer = 0; layer < layers; ++layer)
        copy_layer(pair->from + layer * from_stride, pair->to + layer * to_stride);
  }

 private:
  void copy_layer(const char* from, char* to) const {
    const int64_t bytes = rows * columns * size;
    if (!turned) {
      std::memcpy(to, from, matrices * bytes);
      return;
    }
    for (int64_t matrix = 0; matrix < matrices; ++matrix, from += bytes, to += bytes)
      if (size == 2)
        turn<uint16_t, 8>(reinterpret_cast<const uint16_t*>(from), rows, columns, reinterpret_cast<uint16_t*>(to));
      else
        turn<uint32_t, simd::kWidth>(reinterpret_cast<const uint32_t*>(from), rows, columns,
                                     reinterpret_cast<uint32_t*>(to));
  }
};

}  // namespace chunkcache
