// Attention over chunks.
//
// The arithmetic of a row (one query of one head) is fixed and depends on nothing but the row and its
// keys. Positions are cut into segments of whole chunks. Inside a segment chunks are folded one after
// another into a running (o, m, l): maximum m of the scores, l = sum exp(s - m) and
// o = sum exp(s - m) v. Segments are merged in the order of position. Every product of a chunk runs
// over its whole width with invisible keys weighted zero, and every number of a register tile has its
// own chain of fused multiply-adds, so neither the rows computed together, nor which node a chunk
// belongs to, nor whether its keys came all at once or one by one shows in a single bit. A chunk of
// which a row sees nothing does not touch the row's state, nor does a segment: whether other rows
// had them computed does not show either.
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
constexpr float kHidden = -1e32f;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kTileRows = 256;          // at most so many rows share one unpacking of a chunk
constexpr int kTileBytes = 256 * 1024;  // and their queries and states take at most so much of a cache
constexpr int kFewRows = 8;             // fewer are not worth an unpacking of their own

struct Shape {
  int heads, folded, dim, value_dim, chunk, segment;
  float scale;
  int type;
  int latent;        // values are the first value_dim numbers of keys, and not stored
  int window, span;  // keys that a query sees: so many, or from the last multiple on; 0 for all
  float softcap;     // 0 for none

  // Scores are kept in a unit of their own until their differences are taken to the power of 2.
  float unit() const { return softcap > 0 ? softcap : scale; }
  float log_scale() const { return unit() * kLog2e; }
  int tile_rows() const {
    return std::max(kRows, std::min(kTileRows, kTileBytes / (4 * (dim + value_dim))));
  }
  int columns() const { return padded(chunk); }  // of a row of scores
  int value_columns() const { return padded(value_dim); }
  static int padded(int n) { return (n + kWidth - 1) / kWidth * kWidth; }
  size_t item() const { return item_size(type); }
  size_t key_head() const { return item() * dim * chunk; }
  size_t value_head() const { return item() * chunk * value_dim; }

  // The first key that a query sees which sees none from `limit` on.
  int64_t first(int64_t limit) const {
    const int64_t position = limit - 1;
    const int64_t low = window ? std::max<int64_t>(0, limit - window) : 0;
    return span ? std::max(low, position / span * span) : low;
  }
};

// ---------------------------------------------------------------- one tile of rows

// Running states of rows: what one segment, or all so far, came to. Of a row that has seen nothing
// m is kLowest.
struct State {
  float *o, *m, *l;  // o [rows][width], m [rows], l [rows][kWidth] (lanes are added up at the end)
  int width;

  static size_t floats(int64_t rows, int width) { return rows * (width + kWidth + 1); }
  State(float* memory, int64_t rows, int width)
      : o(memory), m(memory + rows * (width + kWidth)), l(memory + rows * width), width(width) {}

  void clear(int64_t row) const {
    std::fill_n(o + row * width, width, 0.0f);
    std::fill_n(l + row * kWidth, kWidth, 0.0f);
    m[row] = kLowest;
  }

  void clear_first(int rows) const {
    for (int r = 0; r < rows; ++r) clear(r);
  }

  void copy(int64_t row, const State& from, int64_t other) const {
    std::memcpy(o + row * width, from.o + other * width, width * sizeof(float));
    std::memcpy(l + row * kWidth, from.l + other * kWidth, kWidth * sizeof(float));
    m[row] = from.m[other];
  }
};

// Adds one row of states behind what `to` holds.
inline void merge(const State& to, int64_t row, const State& from, int64_t other, float scale) {
  if (from.m[other] == kLowest) return;
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

// One chunk of one head in memory: keys [dim][chunk], values [chunk][value_dim] unless it is latent.
struct Chunk {
  const char *keys, *values;
};

// Rows of one head with the scratch memory of one thread.
class Tile {
  const Shape& s;
  const bool pairs;  // bfloat16 stays what it is; all else is computed in float32
  Buffer<int> limits, firsts;
  Buffer<float> query, key_floats, value_floats, scores;
  Buffer<uint32_t> query_pairs, key_pairs, value_pairs;
  int *limit, *first;  // which keys a row sees, counted from position 0; both ascend from row to row

 public:
  explicit Tile(const Shape& shape)
      : s(shape),
        pairs(kPairs && shape.type == kBfloat16),
        limit(limits.get(shape.tile_rows())),
        first(firsts.get(shape.tile_rows())) {}

  int rows = 0;

  // Adds a row that sees keys before `end`, not fewer than the row before it.
  void add(const void* from, int64_t end) {
    limit[rows] = static_cast<int>(end);
    first[rows] = static_cast<int>(s.first(end));
    load_query(rows++, from);
  }

  // Folds one chunk of one head, whose first key is at `position`, into the states.
  void fold(const Chunk& chunk, const Chunk& next, int position, const State& state) {
    int begin = 0, end = rows;
    while (begin < end && limit[begin] <= position) ++begin;
    while (begin < end && first[end - 1] >= position + s.chunk) --end;
    if (begin == end) return;
    if (pairs)
      fold_as<Pair>(chunk, next, position, begin, end, state);
    else
      fold_as<Single>(chunk, next, position, begin, end, state);
  }

 private:
  template <class Op>
  struct Operands {
    const typename Op::Unit *query, *keys, *values;
    int depth, value_depth;
    int panel, panel_rows;  // values lie in panels of so many columns and rows, one behind the other
  };

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

  template <class Op>
  void fold_as(const Chunk& chunk, const Chunk& next, int position, int r, int end, const State& state) {
    Operands<Op> in = operands<Op>(chunk.keys, chunk.values);
    const int shares = (end - r + kRows - 1) / kRows;
    Ahead keys(next.keys, s.key_head(), 0, 1, shares), values(next.values, s.value_head(), 0, 1, shares);
    for (; r < end; r += kRows) {
      keys.fetch();
      values.fetch();
      switch (std::min(kRows, end - r)) {
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
    float* o = state.o + static_cast<size_t>(row) * state.width;
    for (int j = 0; j < state.width; j += in.panel) {
      const int wide = std::min(in.panel, state.width - j);
      product<Op, R>(weights, columns, in.values + j * in.panel_rows, wide, in.value_depth, wide, o + j, state.width,
                     shrink);
    }
  }

  // Turns rows of products into weights under their new maxima; shrink gets the factors for what was there.
  template <int R>
  void weigh(float* score, int row, int position, const State& state, float* shrink) {
    const int columns = s.columns();
    const Floats scale = simd::all(s.log_scale());
    float before[kWidth] = {}, now[kWidth] = {};
    if (s.softcap > 0) cap(score, R * columns);
    UNROLL for (int r = 0; r < R; ++r) {
      float* line = score + r * columns;
      const int visible = std::min(limit[row + r] - position, s.chunk), hidden = first[row + r] - position;
      if (visible < columns) hide_from(line, visible);
      if (hidden > 0) hide_before(line, hidden);
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

  // Few rows come to these; they are kept out of the way of the rest.
  [[gnu::noinline]] void cap(float* score, int count) {
    const Floats inner = simd::all(s.scale / s.softcap);
    for (int j = 0; j < count; j += kWidth)
      simd::store(score + j, simd::tanh(simd::mul(simd::load(score + j), inner)));
  }

  [[gnu::noinline]] void hide_from(float* line, int visible) {
    for (int j = 0; j < s.columns(); j += kWidth)
      simd::store(line + j, simd::first(visible - j, simd::load(line + j), simd::all(kHidden)));
  }

  [[gnu::noinline]] void hide_before(float* line, int hidden) {
    for (int j = 0; j < s.columns(); j += kWidth)
      simd::store(line + j, simd::first(hidden - j, simd::all(kHidden), simd::load(line + j)));
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
  const float *q = query.get(s.tile_rows() * s.dim), *k = static_cast<const float*>(keys);
  if (s.type != kFloat32 || columns != s.chunk) {
    float* to = key_floats.get(s.dim * columns);
    unpack(keys, s.type, s.dim, s.chunk, columns, to);
    k = to;
  }
  if (s.latent) {
    float* to = value_floats.get(columns * width);
    for (int j = 0; j < width; j += kPanel)
      mirror(k + j * columns, s.value_dim - j, columns, std::min(kPanel, width - j), to + j * columns);
    return {q, k, to, s.dim, s.chunk, kPanel, columns};
  }
  const float* v = static_cast<const float*>(values);
  if (s.type != kFloat32 || width != s.value_dim) {
    float* to = value_floats.get(s.chunk * width);
    unpack(values, s.type, s.chunk, s.value_dim, width, to);
    v = to;
  }
  return {q, k, v, s.dim, s.chunk, width, s.chunk};
}

#if defined(__AVX512BF16__)
template <>
inline Tile::Operands<Pair> Tile::operands<Pair>(const void* keys, const void* values) {
  const int columns = s.columns(), width = s.value_columns();
  const int depth = (s.dim + 1) / 2, value_depth = (s.chunk + 1) / 2;
  uint32_t *q = query_pairs.get(s.tile_rows() * depth), *k = key_pairs.get(depth * columns);
  uint32_t* v = value_pairs.get(value_depth * width);
  unpack_pairs(keys, s.dim, s.chunk, columns, k);
  if (s.latent) {
    const auto* from = static_cast<const uint16_t*>(keys);
    for (int j = 0; j < width; j += kPanel)
      mirror_pairs(from + j * s.chunk, s.value_dim - j, s.chunk, std::min(kPanel, width - j), v + j * value_depth);
    return {q, k, v, depth, value_depth, kPanel, value_depth};
  }
  unpack_pairs(values, s.chunk, s.value_dim, width, v);
  return {q, k, v, depth, value_depth, width, value_depth};
}
#endif

inline void finish(const Shape& s, const State& state, int64_t row, void* to) {
  const float l = simd::sum(simd::load(state.l + row * kWidth));
  const float* o = state.o + row * state.width;
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

inline int64_t parts_of(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

struct Block {  // consecutive chunks in memory
  int64_t keys, values, chunks;

  // One chunk of one head; nothing behind the last.
  Chunk chunk(const Shape& shape, int64_t i, int64_t head) const {
    if (i >= chunks) return {nullptr, nullptr};
    const int64_t place = i * shape.heads + head;
    const char* value = shape.latent ? nullptr : at<char>(values) + place * shape.value_head();
    return {at<char>(keys) + place * shape.key_head(), value};
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

// Where queries and outputs are: of a "place" (a new token, or a row) and a query head.
struct Queries {
  const char* query;
  int64_t query_place, query_head;  // strides in bytes
  char* out;                        // [places][query heads][value_dim]
  const float* sinks;               // [query heads], or null

  const char* from(const Shape& shape, int64_t place, int64_t head, int64_t g) const {
    return query + place * query_place + (head * shape.folded + g) * query_head;
  }

  // What a row has seen before its first key: nothing, or a sink.
  void start(const Shape& shape, int64_t head, int64_t g, const State& total, int row) const {
    total.clear(row);
    if (!sinks) return;
    const float sink = sinks[head * shape.folded + g] / shape.unit();
    if (!(sink > kLowest)) return;
    total.m[row] = std::min(sink, -kLowest);
    total.l[row * kWidth] = 1.0f;
  }

  void finish(const Shape& shape, int64_t place, int64_t head, int64_t g, const State& total, int row) const {
    const int64_t number = (place * shape.heads + head) * shape.folded + g;
    chunkcache::finish(shape, total, row, out + number * shape.item() * shape.value_dim);
  }
};

// New tokens of one sequence against all its chunks and each other.
struct Prefill {
  Shape shape;
  Queries queries;
  int64_t tokens, start;  // position of the first
  const Block* blocks;
  int64_t count;

  // Rows of a head are taken token by token, so many at a time.
  bool attend(int64_t threads) const {
    const int64_t all = tokens * shape.folded;
    int64_t size = std::min<int64_t>(all, shape.tile_rows());
    while (size > 2 * kFewRows && all / size * shape.heads < 2 * threads) size /= 2;  // work for every thread
    const int64_t parts = parts_of(all, size);
    return run<Worker>(shape, parts * shape.heads, threads, [&](Worker& worker, int64_t i) {
      const int64_t part = parts - 1 - i / shape.heads;  // the longest first
      attend(worker, i % shape.heads, part * size, std::min(all, (part + 1) * size));
    });
  }

 private:
  void attend(Worker& worker, int64_t head, int64_t begin, int64_t end) const {
    Tile& tile = worker.tile;
    const State segment = worker.segment(), total = worker.total();
    tile.rows = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / shape.folded, g = i % shape.folded;
      queries.start(shape, head, g, total, tile.rows);
      tile.add(queries.from(shape, token, head, g), start + token + 1);
    }
    fold(tile, head, start + begin / shape.folded + 1, start + (end - 1) / shape.folded + 1, segment, total);
    for (int r = 0; r < tile.rows; ++r) {
      merge(total, r, segment, r, shape.log_scale());
      queries.finish(shape, (begin + r) / shape.folded, head, (begin + r) % shape.folded, total, r);
    }
  }

  // All chunks that any row sees, the first of which sees keys before `least` and the last before `most`.
  void fold(Tile& tile, int64_t head, int64_t least, int64_t most, const State& segment, const State& total) const {
    const int64_t from = shape.first(least) / shape.chunk;
    segment.clear_first(tile.rows);
    int64_t index = 0;
    for (int64_t b = 0; b < count && index * shape.chunk < most; ++b) {
      int64_t c = std::min(std::max<int64_t>(0, from - index), blocks[b].chunks);
      for (index += c; c < blocks[b].chunks && index * shape.chunk < most; ++c, ++index) {
        if (index > from && index % shape.segment == 0) {
          for (int r = 0; r < tile.rows; ++r) merge(total, r, segment, r, shape.log_scale());
          segment.clear_first(tile.rows);
        }
        const bool last = c + 1 == blocks[b].chunks && b + 1 < count;
        const Chunk next = last ? blocks[b + 1].chunk(shape, 0, head) : blocks[b].chunk(shape, c + 1, head);
        tile.fold(blocks[b].chunk(shape, c, head), next, static_cast<int>(index * shape.chunk), segment);
      }
    }
  }
};

// Consecutive chunks of one segment and the rows that attend to them, shorter ones first.
struct Item {
  int64_t source, chunk, chunks, index, rows_begin, rows_end;
};

// One new token of each row.
struct Step {
  Shape shape;
  Queries queries;
  int64_t rows;
  const int64_t* limits;    // [rows] keys that a row sees
  const Block* sources;
  const Item* items;        // in the order of (segment, index)
  const int64_t* segments;  // [count + 1] where the items of a segment begin
  int64_t count;
  const int64_t* members;   // rows of the items
  const int64_t* slots;     // [rows + 1] where the states of a row's segments begin, and their number
  float* states;            // state_floats() of them

  bool attend(int64_t threads) const {
    const int64_t share = shared_heads(threads);
    return each(count, share, threads,
                [&](Worker& worker, int64_t segment, const Part& part) {
                  for (int64_t item = segments[segment]; item < segments[segment + 1]; ++item)
                    fold(worker, part, segment, items[item]);
                }) &&
           each(rows, std::min<int64_t>(shape.folded, kFewRows), threads,
                [&](Worker& worker, int64_t row, const Part& part) { finish_row(worker, part, row); });
  }

 private:
  struct Part {  // of the query heads of one head
    int64_t head, begin, end;
  };

  // How many query heads of a head share an unpacking of its chunks: all, unless threads would find no
  // work. Parts of one segment are even, segments are not.
  int64_t shared_heads(int64_t threads) const {
    const int64_t wanted = count > 1 ? 2 * threads : threads;
    int64_t share = shape.folded, most = 0;
    for (int64_t i = 0; i < segments[count]; ++i) most = std::max(most, items[i].rows_end - items[i].rows_begin);
    while (most * share >= 2 * kFewRows && share > 1 && count * shape.heads * parts_of(shape.folded, share) < wanted)
      share = (share + 1) / 2;
    return share;
  }

  // Runs work(worker, i, part) for i from 0 to number - 1 and all heads in parts of so many query heads.
  template <class Work>
  bool each(int64_t number, int64_t share, int64_t threads, const Work& work) const {
    const int64_t parts = parts_of(shape.folded, share), heads = shape.heads;
    return run<Worker>(shape, number * heads * parts, threads, [&](Worker& worker, int64_t i) {
      const int64_t begin = i % parts * share;
      work(worker, i / parts / heads, {i / parts % heads, begin, std::min<int64_t>(shape.folded, begin + share)});
    });
  }

  State of_head(int64_t head) const {
    const int width = shape.value_columns();
    const int64_t all = slots[rows] * shape.folded;
    return {states + head * static_cast<int64_t>(State::floats(all, width)), all, width};
  }
  int64_t slot(int64_t row, int64_t segment) const { return (slots[row] + segment) * shape.folded; }

  void fold(Worker& worker, const Part& part, int64_t segment, const Item& item) const {
    const int64_t all = (item.rows_end - item.rows_begin) * (part.end - part.begin);
    const int64_t size = parts_of(all, parts_of(all, shape.tile_rows()));  // tiles of even size
    for (int64_t begin = 0; begin < all; begin += size)
      fold(worker, part, segment, item, begin, std::min(all, begin + size));
  }

  // Rows begin .. end of an item, counted member by member.
  void fold(Worker& worker, const Part& part, int64_t segment, const Item& item, int64_t begin, int64_t end) const {
    const int64_t width = part.end - part.begin;
    const auto member = [&](int64_t i) { return members[item.rows_begin + i / width]; };
    const auto place = [&](int64_t i) { return slot(member(i), segment) + part.begin + i % width; };
    const State kept = of_head(part.head), state = worker.segment();
    const bool fresh = item.index % shape.segment == 0;
    const int64_t from = std::max<int64_t>(0, shape.first(limits[member(begin)]) / shape.chunk - item.index);
    if (from >= item.chunks) {  // hidden from all
      for (int64_t i = begin; i < end && fresh; ++i) kept.m[place(i)] = kLowest;
      return;
    }
    Tile& tile = worker.tile;
    tile.rows = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (fresh || kept.m[place(i)] == kLowest)
        state.clear(tile.rows);
      else
        state.copy(tile.rows, kept, place(i));
      tile.add(queries.from(shape, member(i), part.head, part.begin + i % width), limits[member(i)]);
    }
    const Block& source = sources[item.source];
    for (int64_t c = from; c < item.chunks; ++c)
      tile.fold(source.chunk(shape, item.chunk + c, part.head), source.chunk(shape, item.chunk + c + 1, part.head),
                static_cast<int>((item.index + c) * shape.chunk), state);
    for (int64_t i = begin; i < end; ++i) kept.copy(place(i), state, i - begin);
  }

  void finish_row(Worker& worker, const Part& part, int64_t row) const {
    const State kept = of_head(part.head), total = worker.total();
    for (int64_t g = part.begin; g < part.end; ++g) {
      queries.start(shape, part.head, g, total, 0);
      for (int64_t segment = 0; segment < slots[row + 1] - slots[row]; ++segment)
        merge(total, 0, kept, slot(row, segment) + g, shape.log_scale());
      queries.finish(shape, row, part.head, g, total, 0);
    }
  }
};

}  // namespace chunkcache
