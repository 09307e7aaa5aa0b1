// Attention over chunks for x86 processors, compiled once per instruction set.
//
// The arithmetic of a row (one query of one head) is fixed and depends on nothing but the row and its
// keys. Positions are cut into segments of whole chunks. Inside a segment chunks are folded one after
// another into a running (o, m, l): maximum m of the scores, l = sum exp(s - m) and
// o = sum exp(s - m) v. Segments are merged in the order of position. Every product of a chunk runs
// over its whole width with invisible keys weighted zero, and every number of a register tile has its
// own chain of fused multiply-adds, so neither the rows computed together, nor which node a chunk
// belongs to, nor whether its keys came all at once or one by one shows in a single bit.
//
// prefill() takes new tokens of one sequence, step() one new token of each of many sequences, where
// rows that share chunks meet them in one tile (ChunkAttention, Ye et al., 2024, arXiv:2402.15220).

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simd.h"

#define UNROLL _Pragma("GCC unroll 8")  // without it tiles live in memory, not in registers

#ifndef MODULE
#error "name the module: -DMODULE=_avx2"
#endif

extern "C" void GOMP_parallel(void (*task)(void*), void* data, unsigned threads, unsigned flags);

namespace {

using simd::Floats;
using simd::kColumns;
using simd::kRows;
using simd::kWidth;

// In place of minus infinity, so that differences stay numbers: of a row that has seen nothing, and,
// far below it, of a key that must not be seen.
constexpr float kLowest = -1e30f;
constexpr float kHidden = -1e37f;
constexpr int kVersion = 2;  // of the arithmetic and of the arguments; as in library.py
constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kTileRows = 256;  // rows that share one unpacking of a chunk, unless a head has more

enum Type { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Shape {
  int heads, folded, dim, value_dim, chunk, segment;
  float scale;
  int type;

  float log_scale() const { return scale * kLog2e; }  // of differences of scores, to base 2
  int tile_rows() const { return std::max(kTileRows, folded); }
  int columns() const { return padded(chunk); }      // of a row of scores
  int value_columns() const { return padded(value_dim); }
  static int padded(int n) { return (n + kWidth - 1) / kWidth * kWidth; }
  size_t item() const { return type == kFloat32 ? 4 : 2; }
  size_t key_head() const { return item() * dim * chunk; }
  size_t value_head() const { return item() * chunk * value_dim; }
};

// ---------------------------------------------------------------- memory

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

// ---------------------------------------------------------------- products

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

// c = c * scale + a b for R rows of a and C vectors of columns; without scale, c = a b.
template <class Op, int R, int C>
inline void tile(const typename Op::Unit* a, int lda, const typename Op::Unit* b, int ldb, int depth,
                 float* c, int ldc, const float* scale) {
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
inline void product(const typename Op::Unit* a, int lda, const typename Op::Unit* b, int ldb, int depth, int columns,
                    float* c, int ldc, const float* scale) {
  int vectors = columns / kWidth, j = 0;
  for (; j + kColumns <= vectors; j += kColumns)
    tile<Op, R, kColumns>(a, lda, b + j * kWidth, ldb, depth, c + j * kWidth, ldc, scale);
  for (; j < vectors; ++j) tile<Op, R, 1>(a, lda, b + j * kWidth, ldb, depth, c + j * kWidth, ldc, scale);
}

// ---------------------------------------------------------------- unpacking

inline float to_float(uint16_t x, int type) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  if (type == kBfloat16)
    std::memcpy(&value, &bits, 4);
  else
    value = _cvtsh_ss(x);
  return value;
}

void widen(const void* from, int type, int count, float* to) {
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

// `rows` rows of `count` numbers as float32, each row padded with zeros to `width`.
void unpack(const void* from, int type, int rows, int count, int width, float* to) {
  size_t stride = count * (type == kFloat32 ? 4 : 2);
  for (int r = 0; r < rows; ++r, to += width) {
    widen(static_cast<const char*>(from) + r * stride, type, count, to);
    std::fill(to + count, to + width, 0.0f);
  }
}

#if defined(__AVX512BF16__)
// Rows 2r and 2r + 1 as one row of pairs, padded with zeros to `width` (and to an even number of rows).
void unpack_pairs(const void* from, int rows, int count, int width, uint32_t* to) {
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
#endif

// ---------------------------------------------------------------- one tile of rows

// Running states of rows: what one segment, or all so far, came to.
struct State {
  float *o, *m, *l;  // o [rows][width], m [rows], l [rows][kWidth] (lanes are added up at the end)
  int width;

  static size_t floats(int64_t rows, int width) { return rows * (width + kWidth + 1); }
  State(float* memory, int64_t rows, int width)
      : o(memory), m(memory + rows * (width + kWidth)), l(memory + rows * width), width(width) {}

  void clear(int rows) const {
    std::fill(o, o + static_cast<size_t>(rows) * width, 0.0f);
    std::fill(l, l + static_cast<size_t>(rows) * kWidth, 0.0f);
    std::fill(m, m + rows, kLowest);
  }

  void copy(int64_t row, const State& from, int64_t other) const {
    std::memcpy(o + row * width, from.o + other * width, width * sizeof(float));
    std::memcpy(l + row * kWidth, from.l + other * kWidth, kWidth * sizeof(float));
    m[row] = from.m[other];
  }
};

// Adds one row of states behind what `to` holds.
void merge(const State& to, int64_t row, const State& from, int64_t other, float scale) {
  const float top = std::max(to.m[row], from.m[other]);
  const Floats old = simd::exp2(simd::all((to.m[row] - top) * scale));
  const Floats fresh = simd::exp2(simd::all((from.m[other] - top) * scale));
  float *o = to.o + row * to.width, *l = to.l + row * kWidth;
  const float* p = from.o + other * from.width;
  for (int i = 0; i < to.width; i += kWidth)
    simd::store(o + i, simd::fma(simd::load(p + i), fresh, simd::mul(simd::load(o + i), old)));
  simd::store(l, simd::fma(simd::load(from.l + other * kWidth), fresh, simd::mul(simd::load(l), old)));
  to.m[row] = top;
}

// Rows of one head with the scratch memory of one thread.
class Tile {
  const Shape& s;
  const bool pairs;  // bfloat16 stays what it is; all else is computed in float32
  Buffer<int> limits;
  Buffer<float> query, key_floats, value_floats, scores;
  Buffer<uint32_t> query_pairs, key_pairs, value_pairs;

 public:
  explicit Tile(const Shape& shape)
      : s(shape), pairs(kPairs && shape.type == kBfloat16), limit(limits.get(shape.tile_rows())) {}

  int rows = 0;
  int* const limit;  // keys that a row sees, counted from position 0

  void load_query(int row, const void* from) {
    if (pairs) {
      int units = (s.dim + 1) / 2;
      uint32_t* to = query_pairs.get(s.tile_rows() * units) + row * units;
      to[units - 1] = 0;  // half of it stays, if the dimension is odd
      std::memcpy(to, from, s.dim * 2);
    } else {
      widen(from, s.type, s.dim, query.get(s.tile_rows() * s.dim) + row * s.dim);
    }
  }

  // Folds one chunk of one head, whose first key is at `position`, into the states.
  void fold(const void* keys, const void* values, int position, const State& state) {
    if (pairs)
      fold_as<Pair>(keys, values, position, state);
    else
      fold_as<Single>(keys, values, position, state);
  }

 private:
  template <class Op>
  struct Operands {
    const typename Op::Unit *query, *keys, *values;
    int depth, value_depth;
  };

  template <class Op>
  void fold_as(const void* keys, const void* values, int position, const State& state) {
    Operands<Op> in = operands<Op>(keys, values);
    int r = 0;
    while (r < rows && limit[r] <= position) ++r;  // rows that see nothing of the chunk come first
    for (; r < rows; r += kRows) {
      switch (std::min(kRows, rows - r)) {
        case 1: fold_rows<Op, 1>(in, r, position, state); break;
        case 2: fold_rows<Op, 2>(in, r, position, state); break;
        case 3: fold_rows<Op, 3>(in, r, position, state); break;
        case 4: fold_rows<Op, 4>(in, r, position, state); break;
        case 5: fold_rows<Op, 5>(in, r, position, state); break;
        default: fold_rows<Op, kRows>(in, r, position, state);
      }
    }
  }

  template <class Op>
  Operands<Op> operands(const void* keys, const void* values);

  template <class Op, int R>
  void fold_rows(const Operands<Op>& in, int row, int position, const State& state) {
    const int columns = s.columns();
    float* score = scores.get(kRows * columns);
    float shrink[kWidth];
    product<Op, R>(in.query + row * in.depth, in.depth, in.keys, columns, in.depth, columns, score, columns, nullptr);
    weigh<R>(score, row, position, state, shrink);
    auto* weights = reinterpret_cast<const typename Op::Unit*>(score);
    product<Op, R>(weights, columns, in.values, state.width, in.value_depth, state.width,
                   state.o + static_cast<size_t>(row) * state.width, state.width, shrink);
  }

  // Turns rows of products into weights under their new maxima; shrink gets the factors for what was there.
  template <int R>
  void weigh(float* score, int row, int position, const State& state, float* shrink) {
    const int columns = s.columns();
    const Floats scale = simd::all(s.log_scale());
    float before[kWidth] = {}, now[kWidth] = {};
    UNROLL for (int r = 0; r < R; ++r) {
      float* line = score + r * columns;
      const int visible = std::min(limit[row + r] - position, s.chunk);
      if (visible < columns) hide(line, visible);
      Floats top = simd::load(line);
      for (int j = kWidth; j < columns; j += kWidth) top = simd::max(top, simd::load(line + j));
      before[r] = state.m[row + r];
      now[r] = std::max(before[r], simd::largest(top));
    }
    simd::store(shrink, simd::exp2(simd::mul(simd::sub(simd::load(before), simd::load(now)), scale)));
    UNROLL for (int r = 0; r < R; ++r) {
      float *line = score + r * columns, *l = state.l + (row + r) * kWidth;
      const Floats top = simd::all(now[r]);
      Floats sum = simd::mul(simd::load(l), simd::all(shrink[r]));
      for (int j = 0; j < columns; j += kWidth) {
        // Subtracted first: never above zero, whatever the size of the scores.
        const Floats weight = simd::exp2(simd::mul(simd::sub(simd::load(line + j), top), scale));
        sum = simd::add(sum, weight);
        put(line, j, weight);
      }
      simd::store(l, sum);
      state.m[row + r] = now[r];
    }
  }

  void hide(float* line, int visible) {
    for (int j = 0; j < s.columns(); j += kWidth)
      simd::store(line + j, simd::first(visible - j, simd::load(line + j), simd::all(kHidden)));
  }

  // Weights take the place of scores already read: as they are, or as pairs in half the room.
  void put(float* score, int j, Floats weight) {
#if defined(__AVX512BF16__)
    if (pairs) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(score) + j),
                          (__m256i)_mm512_cvtneps_pbh(weight));
      return;
    }
#endif
    simd::store(score + j, weight);
  }
};

template <>
Tile::Operands<Single> Tile::operands<Single>(const void* keys, const void* values) {
  const int columns = s.columns(), width = s.value_columns();
  const float *k = static_cast<const float*>(keys), *v = static_cast<const float*>(values);
  if (s.type != kFloat32 || columns != s.chunk) {
    float* to = key_floats.get(s.dim * columns);
    unpack(keys, s.type, s.dim, s.chunk, columns, to);
    k = to;
  }
  if (s.type != kFloat32 || width != s.value_dim) {
    float* to = value_floats.get(s.chunk * width);
    unpack(values, s.type, s.chunk, s.value_dim, width, to);
    v = to;
  }
  return {query.get(s.tile_rows() * s.dim), k, v, s.dim, s.chunk};
}

#if defined(__AVX512BF16__)
template <>
Tile::Operands<Pair> Tile::operands<Pair>(const void* keys, const void* values) {
  const int columns = s.columns(), width = s.value_columns();
  const int depth = (s.dim + 1) / 2, value_depth = (s.chunk + 1) / 2;
  uint32_t* k = key_pairs.get(depth * columns);
  uint32_t* v = value_pairs.get(value_depth * width);
  unpack_pairs(keys, s.dim, s.chunk, columns, k);
  unpack_pairs(values, s.chunk, s.value_dim, width, v);
  return {query_pairs.get(s.tile_rows() * depth), k, v, depth, value_depth};
}
#endif

void finish(const Shape& s, const State& state, int row, void* to) {
  const float l = simd::sum(simd::load(state.l + row * kWidth));
  const float* o = state.o + static_cast<size_t>(row) * state.width;
  for (int i = 0; i < s.value_dim; ++i) {
    float value = o[i] / l;
    if (s.type == kFloat32) {
      static_cast<float*>(to)[i] = value;
    } else if (s.type == kFloat16) {
      static_cast<uint16_t*>(to)[i] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits = value != value ? 0x7fc00000u : bits + 0x7fffu + (bits >> 16 & 1u);
      static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
}

// ---------------------------------------------------------------- tasks

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

struct Block {  // consecutive chunks in memory
  int64_t keys, values, chunks;
};

// What one thread needs to work through tasks.
struct Worker {
  explicit Worker(const Shape& shape) : tile(shape), rows(shape.tile_rows()), width(shape.value_columns()) {}
  Tile tile;
  const int rows, width;

  State segment() { return {segment_.get(State::floats(rows, width)), rows, width}; }
  State total() { return {total_.get(State::floats(rows, width)), rows, width}; }

 private:
  Buffer<float> segment_, total_;
};

// Rounding and denormals as IEEE 754 has them, whatever the thread was set to.
class PlainArithmetic {
 public:
  PlainArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~PlainArithmetic() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

// Runs work(worker, i) for i from 0 to count - 1 on the threads that torch uses too: the symbol is that
// of the OpenMP that torch brought (library.py), so that two pools never compete for cores. The team is
// always whole: libgomp ends threads that a smaller one leaves out, and torch would start them again.
template <class Work>
class Team {
 public:
  Team(const Shape& shape, int64_t count, const Work& work) : shape_(shape), count_(count), work_(work) {}

  bool run(int64_t threads) {
    if (threads > 1 && count_ > 1)
      GOMP_parallel([](void* self) { static_cast<Team*>(self)->take(); }, this, static_cast<unsigned>(threads), 0);
    else
      take();
    return !failed_;
  }

 private:
  void take() noexcept {
    int64_t i = next_.fetch_add(1);
    if (i >= count_) return;
    const PlainArithmetic plain;
    try {
      Worker worker(shape_);
      for (; i < count_; i = next_.fetch_add(1)) work_(worker, i);
    } catch (const std::bad_alloc&) {
      failed_ = true;
    }
  }

  const Shape& shape_;
  const int64_t count_;
  const Work& work_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
};

// Whether there was memory enough.
template <class Work>
bool run(const Shape& shape, int64_t count, int64_t threads, const Work& work) {
  return Team<Work>(shape, count, work).run(threads);
}

// New tokens of one sequence against all its chunks and each other.
struct Prefill {
  Shape shape;
  const char* query;
  int64_t query_head, query_token;  // strides in bytes
  char* out;                        // [tokens][query heads][value_dim]
  int64_t tokens, start;            // position of the first
  const Block* blocks;
  int64_t count;

  bool attend(int64_t threads) const {
    int64_t size = std::min<int64_t>(tokens, shape.tile_rows() / shape.folded);
    while (size > 8 && tokens / size * shape.heads < 2 * threads) size /= 2;  // work for every thread
    const int64_t parts = (tokens + size - 1) / size;
    return run(shape, parts * shape.heads, threads, [&](Worker& worker, int64_t i) {
      const int64_t part = parts - 1 - i / shape.heads;  // the longest first
      attend(worker, i % shape.heads, part * size, std::min(tokens, (part + 1) * size));
    });
  }

 private:
  void attend(Worker& worker, int64_t head, int64_t begin, int64_t end) const {
    Tile& tile = worker.tile;
    tile.rows = 0;
    for (int64_t token = begin; token < end; ++token)
      for (int g = 0; g < shape.folded; ++g, ++tile.rows) {
        tile.load_query(tile.rows, query + (head * shape.folded + g) * query_head + token * query_token);
        tile.limit[tile.rows] = static_cast<int>(start + token + 1);
      }
    const State segment = worker.segment(), total = worker.total();
    segment.clear(tile.rows);
    total.clear(tile.rows);
    int64_t index = 0;
    for (int64_t b = 0; b < count; ++b)
      for (int64_t c = 0; c < blocks[b].chunks && index * shape.chunk < start + end; ++c, ++index) {
        if (index && index % shape.segment == 0) {
          for (int r = 0; r < tile.rows; ++r) merge(total, r, segment, r, shape.log_scale());
          segment.clear(tile.rows);
        }
        const char* keys = at<char>(blocks[b].keys) + (c * shape.heads + head) * shape.key_head();
        const char* values = at<char>(blocks[b].values) + (c * shape.heads + head) * shape.value_head();
        tile.fold(keys, values, static_cast<int>(index * shape.chunk), segment);
      }
    const int64_t stride = shape.item() * shape.value_dim;
    for (int r = 0; r < tile.rows; ++r) {
      merge(total, r, segment, r, shape.log_scale());
      const int64_t token = begin + r / shape.folded, g = r % shape.folded;
      finish(shape, total, r, out + ((token * shape.heads + head) * shape.folded + g) * stride);
    }
  }
};

// Consecutive chunks of one segment and the rows that attend to them.
struct Item {
  int64_t source, chunk, chunks, index, rows_begin, rows_end;
};

// One new token of each row.
struct Step {
  Shape shape;
  const char* query;
  int64_t query_row, query_head;  // strides in bytes
  char* out;                      // [rows][query heads][value_dim]
  int64_t rows;
  const int64_t* limits;          // [rows] keys that a row sees
  const Block* sources;
  const Item* items;              // in the order of (segment, index)
  const int64_t* segments;        // [count + 1] where the items of a segment begin
  int64_t count;
  const int64_t* members;         // rows of the items
  const int64_t* slots;           // [rows + 1] where the states of a row's segments begin, and their number
  float* states;                  // state_floats() of them

  bool attend(int64_t threads) const {
    const bool folded = run(shape, count * shape.heads, threads, [&](Worker& worker, int64_t i) {
      const int64_t head = i % shape.heads, segment = i / shape.heads;
      for (int64_t item = segments[segment]; item < segments[segment + 1]; ++item)
        fold(worker, head, segment, items[item]);
    });
    return folded && run(shape, rows * shape.heads, threads, [&](Worker& worker, int64_t i) {
      finish_row(worker, i % shape.heads, i / shape.heads);
    });
  }

 private:
  State of_head(int64_t head) const {
    const int width = shape.value_columns();
    const int64_t all = slots[rows] * shape.folded;
    return {states + head * static_cast<int64_t>(State::floats(all, width)), all, width};
  }
  int64_t slot(int64_t row, int64_t segment) const { return (slots[row] + segment) * shape.folded; }

  void fold(Worker& worker, int64_t head, int64_t segment, const Item& item) const {
    const int64_t most = shape.tile_rows() / shape.folded;
    for (int64_t begin = item.rows_begin; begin < item.rows_end; begin += most)
      fold(worker, head, segment, item, begin, std::min(item.rows_end, begin + most));
  }

  void fold(Worker& worker, int64_t head, int64_t segment, const Item& item, int64_t begin, int64_t end) const {
    Tile& tile = worker.tile;
    const State kept = of_head(head), state = worker.segment();
    tile.rows = 0;
    for (int64_t i = begin; i < end; ++i)
      for (int g = 0; g < shape.folded; ++g, ++tile.rows) {
        tile.load_query(tile.rows, query + members[i] * query_row + (head * shape.folded + g) * query_head);
        tile.limit[tile.rows] = static_cast<int>(limits[members[i]]);
        if (item.index % shape.segment) state.copy(tile.rows, kept, slot(members[i], segment) + g);
      }
    if (item.index % shape.segment == 0) state.clear(tile.rows);
    const Block& source = sources[item.source];
    for (int64_t c = 0; c < item.chunks; ++c) {
      const int64_t place = (item.chunk + c) * shape.heads + head;
      const char* keys = at<char>(source.keys) + place * shape.key_head();
      const char* values = at<char>(source.values) + place * shape.value_head();
      tile.fold(keys, values, static_cast<int>((item.index + c) * shape.chunk), state);
    }
    for (int r = 0; r < tile.rows; ++r)
      kept.copy(slot(members[begin + r / shape.folded], segment) + r % shape.folded, state, r);
  }

  void finish_row(Worker& worker, int64_t head, int64_t row) const {
    const State kept = of_head(head), total = worker.total();
    total.clear(shape.folded);
    for (int64_t segment = 0; segment < slots[row + 1] - slots[row]; ++segment)
      for (int g = 0; g < shape.folded; ++g) merge(total, g, kept, slot(row, segment) + g, shape.log_scale());
    const int64_t stride = shape.item() * shape.value_dim;
    for (int g = 0; g < shape.folded; ++g)
      finish(shape, total, g, out + ((row * shape.heads + head) * shape.folded + g) * stride);
  }
};

// ---------------------------------------------------------------- Python

// Shapes come as (heads, folded, dim, value_dim, chunk, segment, scale, type); addresses and strides
// as integers, strides in bytes. kernel.py checks them and says what the arrays hold.
#define SHAPE_FORMAT "(iiiiiifi)"
#define SHAPE_FIELDS(s) &s.heads, &s.folded, &s.dim, &s.value_dim, &s.chunk, &s.segment, &s.scale, &s.type

PyObject* answer(bool done) {
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* prefill(PyObject*, PyObject* args) {
  Prefill job;
  long long tokens, start, count, head, token, threads;
  unsigned long long query, out, blocks;
  if (!PyArg_ParseTuple(args, SHAPE_FORMAT "KLLKLLKLL", SHAPE_FIELDS(job.shape), &query, &head, &token, &out, &tokens,
                        &start, &blocks, &count, &threads))
    return nullptr;
  job.query = at<char>(query), job.query_head = head, job.query_token = token, job.out = at<char>(out);
  job.tokens = tokens, job.start = start, job.blocks = at<Block>(blocks), job.count = count;
  bool done;
  Py_BEGIN_ALLOW_THREADS
  done = job.attend(threads);
  Py_END_ALLOW_THREADS
  return answer(done);
}

PyObject* step(PyObject*, PyObject* args) {
  Step job;
  long long rows, head, row, count, threads;
  unsigned long long query, out, limits, sources, items, segments, members, slots, states;
  if (!PyArg_ParseTuple(args, SHAPE_FORMAT "KLLKLKKKKLKKKL", SHAPE_FIELDS(job.shape), &query, &row, &head, &out, &rows,
                        &limits, &sources, &items, &segments, &count, &members, &slots, &states, &threads))
    return nullptr;
  job.query = at<char>(query), job.query_row = row, job.query_head = head, job.out = at<char>(out), job.rows = rows;
  job.limits = at<int64_t>(limits), job.sources = at<Block>(sources), job.items = at<Item>(items);
  job.segments = at<int64_t>(segments), job.count = count, job.members = at<int64_t>(members);
  job.slots = at<int64_t>(slots), job.states = at<float>(states);
  bool done;
  Py_BEGIN_ALLOW_THREADS
  done = job.attend(threads);
  Py_END_ALLOW_THREADS
  return answer(done);
}

// Floats of memory that the states of a step take: (shape, slots of all rows).
PyObject* state_floats(PyObject*, PyObject* args) {
  Shape shape;
  long long slots;
  if (!PyArg_ParseTuple(args, SHAPE_FORMAT "L", SHAPE_FIELDS(shape), &slots)) return nullptr;
  return PyLong_FromSize_t(shape.heads * State::floats(slots * shape.folded, shape.value_columns()));
}

// Whether this processor has the instructions that this module is compiled for.
PyObject* supported(PyObject*, PyObject*) {
  bool yes = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // and so F16C
#if defined(__AVX512F__)
  yes = yes && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#if defined(__AVX512BF16__)
  yes = yes && __builtin_cpu_supports("avx512bf16");
#endif
  return PyBool_FromLong(yes);
}

PyMethodDef methods[] = {{"supported", supported, METH_NOARGS, nullptr},
                         {"prefill", prefill, METH_VARARGS, nullptr},
                         {"step", step, METH_VARARGS, nullptr},
                         {"state_floats", state_floats, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define INIT_OF(name) PyInit_##name
#define INIT(name) INIT_OF(name)

PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(MODULE), nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC INIT(MODULE)() {
  PyObject* made = PyModule_Create(&module);
  if (made && PyModule_AddIntConstant(made, "VERSION", kVersion)) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
