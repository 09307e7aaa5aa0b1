// Attention over chunks.
//
// The arithmetic of a row (one query of one head) is fixed and depends on nothing but the row and its
// keys. Positions are cut into segments of whole chunks. Inside a segment chunks are folded one after
// another into a running (o, m, l): maximum m of the scores, l = sum exp(s - m) and
// o = sum exp(s - m) v. Segments are merged in the order of position. Every product of a chunk runs
// over its whole width with invisible keys weighted zero, and every number of a register tile has its
// own chain of fused multiply-adds, so neither the rows computed together, nor which node a chunk
// belongs to, nor whether its keys came all at once or one by one shows in a single bit.
//
// Prefill takes new tokens of one sequence, Step one new token of each of many sequences, where rows
// that share chunks meet them in one tile (ChunkAttention, Ye et al., 2024, arXiv:2402.15220).
#pragma once

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "product.h"
#include "threads.h"

namespace chunkcache {

// In place of minus infinity, so that differences stay numbers: of a row that has seen nothing, and,
// far below it, of a key that must not be seen.
constexpr float kLowest = -1e30f;
constexpr float kHidden = -1e37f;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kTileRows = 256;  // rows that share one unpacking of a chunk, unless a head has more

struct Shape {
  int heads, folded, dim, value_dim, chunk, segment;
  float scale;
  int type;

  float log_scale() const { return scale * kLog2e; }  // of differences of scores, to base 2
  int tile_rows() const { return std::max(kTileRows, folded); }
  int columns() const { return padded(chunk); }      // of a row of scores
  int value_columns() const { return padded(value_dim); }
  static int padded(int n) { return (n + kWidth - 1) / kWidth * kWidth; }
  size_t item() const { return item_size(type); }
  size_t key_head() const { return item() * dim * chunk; }
  size_t value_head() const { return item() * chunk * value_dim; }
};

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
inline void merge(const State& to, int64_t row, const State& from, int64_t other, float scale) {
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

// One chunk of one head in memory: keys [dim][chunk], values [chunk][value_dim].
struct Chunk {
  const char *keys, *values;
};

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
  void fold(const Chunk& chunk, const Chunk& next, int position, const State& state) {
    if (pairs)
      fold_as<Pair>(chunk, next, position, state);
    else
      fold_as<Single>(chunk, next, position, state);
  }

 private:
  template <class Op>
  struct Operands {
    const typename Op::Unit *query, *keys, *values;
    int depth, value_depth;
  };

  template <class Op>
  void fold_as(const Chunk& chunk, const Chunk& next, int position, const State& state) {
    Operands<Op> in = operands<Op>(chunk.keys, chunk.values);
    const int shares = (rows + kRows - 1) / kRows;
    Ahead keys(next.keys, s.key_head(), 0, 1, shares), values(next.values, s.value_head(), 0, 1, shares);
    int r = 0;
    while (r < rows && limit[r] <= position) ++r;  // rows that see nothing of the chunk come first
    for (; r < rows; r += kRows) {
      keys.fetch();
      values.fetch();
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
inline Tile::Operands<Single> Tile::operands<Single>(const void* keys, const void* values) {
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
inline Tile::Operands<Pair> Tile::operands<Pair>(const void* keys, const void* values) {
  const int columns = s.columns(), width = s.value_columns();
  const int depth = (s.dim + 1) / 2, value_depth = (s.chunk + 1) / 2;
  uint32_t* k = key_pairs.get(depth * columns);
  uint32_t* v = value_pairs.get(value_depth * width);
  unpack_pairs(keys, s.dim, s.chunk, columns, k);
  unpack_pairs(values, s.chunk, s.value_dim, width, v);
  return {query_pairs.get(s.tile_rows() * depth), k, v, depth, value_depth};
}
#endif

inline void finish(const Shape& s, const State& state, int row, void* to) {
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
inline T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

struct Block {  // consecutive chunks in memory
  int64_t keys, values, chunks;

  // One chunk of one head; nothing behind the last.
  Chunk chunk(const Shape& shape, int64_t i, int64_t head) const {
    if (i >= chunks) return {nullptr, nullptr};
    const int64_t place = i * shape.heads + head;
    return {at<char>(keys) + place * shape.key_head(), at<char>(values) + place * shape.value_head()};
  }
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
    return run<Worker>(shape, parts * shape.heads, threads, [&](Worker& worker, int64_t i) {
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
        const bool last = c + 1 == blocks[b].chunks && b + 1 < count;
        const Chunk next = last ? blocks[b + 1].chunk(shape, 0, head) : blocks[b].chunk(shape, c + 1, head);
        tile.fold(blocks[b].chunk(shape, c, head), next, static_cast<int>(index * shape.chunk), segment);
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
    const bool folded = run<Worker>(shape, count * shape.heads, threads, [&](Worker& worker, int64_t i) {
      const int64_t head = i % shape.heads, segment = i / shape.heads;
      for (int64_t item = segments[segment]; item < segments[segment + 1]; ++item)
        fold(worker, head, segment, items[item]);
    });
    return folded && run<Worker>(shape, rows * shape.heads, threads, [&](Worker& worker, int64_t i) {
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
    for (int64_t c = 0; c < item.chunks; ++c)
      tile.fold(source.chunk(shape, item.chunk + c, head), source.chunk(shape, item.chunk + c + 1, head),
                static_cast<int>((item.index + c) * shape.chunk), state);
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

}  // namespace chunkcache
