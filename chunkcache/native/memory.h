// Scratch memory, and what lies in tensors as numbers that products take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simd.h"

namespace chunkcache {

using simd::kWidth;

enum Type { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

inline size_t item_size(int type) { return type == kFloat32 ? 4 : 2; }

template <class T>
class Buffer {  // aligned, growing, contents lost on growth
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T* get(size_t count) {
    if (count > size_) {
      std::free(data_);
      data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
      size_ = data_ ? count : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

// Fetches `rows` rows of so many bytes, `stride` apart, into the cache in `shares` portions, between other
// work: all at once would fill the queues to memory and stop everything else. Nothing is fetched from null.
class Ahead {
 public:
  Ahead(const void* first, int64_t bytes, int64_t stride, int64_t rows, int64_t shares)
      : line_(static_cast<const char*>(first)), bytes_(bytes), stride_(stride) {
    rest_ = first ? (bytes + kLine - 1) / kLine * rows : 0;
    share_ = (rest_ + shares - 1) / shares;
  }

  void fetch() {
    for (int64_t i = std::min(share_, rest_); i > 0; --i, --rest_) {
      _mm_prefetch(line_ + at_, _MM_HINT_T1);
      at_ += kLine;
      if (at_ >= bytes_) at_ = 0, line_ += stride_;
    }
  }

 private:
  static constexpr int kLine = 64;
  const char* line_;
  const int64_t bytes_, stride_;
  int64_t rest_, share_, at_ = 0;
};

inline float to_float(uint16_t x, int type) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  if (type == kBfloat16)
    std::memcpy(&value, &bits, 4);
  else
    value = _cvtsh_ss(x);
  return value;
}

inline void widen(const void* from, int type, int count, float* to) {
  if (type == kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  auto* p = static_cast<const uint16_t*>(from);
  int i = 0;
  for (; i + kWidth <= count; i += kWidth)
    simd::store(to + i, type == kBfloat16 ? simd::from_bfloat16(p + i) : simd::from_float16(p + i));
  for (; i < count; ++i) to[i] = to_float(p[i], type);
}

// Turns float32 into the type in place, in whole vectors; float16 never comes here.
inline void narrow(float* numbers, int type, int count) {
#if defined(__AVX512BF16__)
  if (type == kBfloat16)
    for (int i = 0; i < count; i += kWidth) {
      auto* to = reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(numbers) + i);
      _mm256_storeu_si256(to, (__m256i)_mm512_cvtneps_pbh(simd::load(numbers + i)));
    }
#endif
}

// `rows` rows of `count` numbers as float32, each row padded with zeros to `width`.
inline void unpack(const void* from, int type, int rows, int count, int width, float* to) {
  size_t stride = count * item_size(type);
  for (int r = 0; r < rows; ++r, to += width) {
    widen(static_cast<const char*>(from) + r * stride, type, count, to);
    std::fill(to + count, to + width, 0.0f);
  }
}

// At most `width` of `rows` rows [stride] of 32 bits as columns of [stride][width], zeros if they are fewer.
template <class Unit>
inline void mirror(const Unit* from, int rows, int stride, int width, Unit* to) {
  int i = 0;
  for (; i + kWidth <= std::min(rows, width); i += kWidth)
    for (int j = 0; j < stride; j += kWidth) simd::transpose(from + i * stride + j, stride, to + j * width + i, width);
  for (; i < width; ++i)
    for (int j = 0; j < stride; ++j) to[j * width + i] = i < rows ? from[i * stride + j] : Unit{0};
}

#if defined(__AVX512BF16__)
// Rows 2r and 2r + 1 as one row of pairs, padded with zeros to `width` (and to an even number of rows).
inline void unpack_pairs(const void* from, int rows, int count, int width, uint32_t* to) {
  alignas(64) static const uint16_t lanes[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(lanes), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  auto* a = static_cast<const uint16_t*>(from);
  for (int r = 0; r < rows; r += 2, a += 2 * count, to += width) {
    const uint16_t* b = a + count;
    int i = 0;
    if (r + 1 < rows)
      for (; i + 32 <= count; i += 32) {
        const __m512i x = _mm512_loadu_si512(a + i), y = _mm512_loadu_si512(b + i);
        _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(x, low, y));
        _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(x, high, y));
      }
    for (; i < count; ++i) to[i] = a[i] | (r + 1 < rows ? static_cast<uint32_t>(b[i]) << 16 : 0u);
    for (; i < width; ++i) to[i] = 0;
  }
}

// As mirror, where rows hold `count` numbers of 16 bits, of which 2j and 2j + 1 become a pair.
inline void mirror_pairs(const uint16_t* from, int rows, int count, int width, uint32_t* to) {
  if (count % (2 * kWidth) == 0) return mirror(reinterpret_cast<const uint32_t*>(from), rows, count / 2, width, to);
  for (int j = 0; j < count; j += 2, to += width)
    for (int i = 0; i < width; ++i) {
      const uint16_t* pair = from + i * count + j;
      to[i] = i < rows ? pair[0] | (j + 1 < count ? static_cast<uint32_t>(pair[1]) << 16 : 0u) : 0u;
    }
}
#endif

}  // namespace chunkcache
