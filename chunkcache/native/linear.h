// x w^T + bias for rows x of activations and a matrix w of weights, as torch.nn.Linear has it; and as many
// such products side by side as there are heads.
//
// Every number is a sum over blocks of the depth, in order, and a block is one chain of fused
// multiply-adds. So a row's bits depend on the row and the weights alone, whatever the other rows are
// and however many; which libraries do not promise, since they choose their code by the shape.
//
// Weights lie row by row, and a register tile wants them column by column. They are turned over, a panel
// of columns and a block of depth at a time: a twentieth of the time of the products at 64 rows, and
// hidden behind the reading of the weights at few. Weights that lie depth by depth need no turning.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "memory.h"
#include "product.h"
#include "threads.h"

namespace chunkcache {

constexpr int kDepth = 256;  // units of depth in a block; decides bits, what follows does not
constexpr int kMostRows = 512;             // of activations that share a turned panel
constexpr int kSmall = 1 << 17;            // multiplications that take less time than calling threads

// Scratch memory of one thread.
class LinearWorker {
 public:
  explicit LinearWorker(int64_t rows) : panel_size_(size_t{kDepth} * kPanel), sums_size_(rows * kPanel) {}
  uint32_t* panel() { return panel_.get(panel_size_); }
  float* sums() { return sums_.get(sums_size_); }

 private:
  const size_t panel_size_, sums_size_;
  Buffer<uint32_t> panel_;
  Buffer<float> sums_;
};

// A matrix per head: numbers lie side by side, strides are in bytes.
template <class Pointer>
struct Matrices {
  Pointer first;
  int64_t stride, head;  // between lines, and between heads

  Pointer line(int64_t h, int64_t i) const { return first + h * head + i * stride; }
};

// Work of one call. A unit is a float, or a pair of bfloat16 (then depths are even).
struct Linear {
  int type;
  int64_t heads, count, depth, columns;  // depth in units
  Matrices<const char*> rows;            // [count][depth]
  Matrices<const char*> weights;         // [columns][depth], or if they lie across [depth][columns]
  bool across;
  const char* bias;  // [columns] of every head; null if there is none
  Matrices<char*> out;  // [count][columns]

  bool multiply(int64_t threads) const {
    int64_t block = kMostRows, width = kPanel;
    while (block > 64 && tasks(block, width) < 4 * threads) block /= 2;
    while (width > kWidth && tasks(block, width) < 2 * threads) width /= 2;
    const int64_t panels = parts(columns, width), each = parts(count, block) * panels;
    const bool small = heads * count * depth * columns < kSmall;
    const auto work = [&](LinearWorker& worker, int64_t i) {
      const int64_t begin = i % each / panels * block, first = i % panels * width;
      const int64_t later = std::min(i + threads, heads * each - 1);  // what a thread is likely to take next
      const Part part{i / each, begin, std::min(count, begin + block), first, std::min(columns, first + width),
                      later / each, later % panels * width};
      if (type == kFloat32)
        multiply<Single>(worker, part);
      else
        multiply<Pair>(worker, part);
    };
    return run<LinearWorker>(std::min(block, count), tasks(block, width), small ? 1 : threads, work);
  }

 private:
  struct Part {  // of the output of one head, and head and first column of the part that comes after it
    int64_t head, row_begin, row_end, begin, end, next_head, next;
  };

  static int64_t parts(int64_t whole, int64_t size) { return (whole + size - 1) / size; }
  int64_t tasks(int64_t block, int64_t width) const { return heads * parts(count, block) * parts(columns, width); }
  int64_t numbers() const { return type == kFloat32 ? 1 : 2; }  // in a unit

  // The weights that are turned after those of a part from depth k on.
  Ahead after(const Part& part, int64_t k, int64_t shares) const {
    const bool deeper = k + kDepth < depth;
    const int64_t head = deeper ? part.head : part.next_head, first = deeper ? part.begin : part.next;
    const int64_t from = deeper ? k + kDepth : 0, units = std::min<int64_t>(kDepth, depth - from);
    const int64_t width = std::min<int64_t>(kPanel, columns - first);
    const char* start = weight(head, first, from);
    return across ? Ahead(start, width * item_size(type), weights.stride, units * numbers(), shares)
                  : Ahead(start, units * 4, weights.stride, width, shares);
  }

  // Where the weights of one column begin from depth k on.
  const char* weight(int64_t head, int64_t column, int64_t k) const {
    return across ? weights.line(head, k * numbers()) + column * item_size(type)
                  : weights.line(head, column) + k * 4;
  }

  template <class Op>
  void multiply(LinearWorker& worker, const Part& part) const {
    using Unit = typename Op::Unit;
    const int width = padded(part.end - part.begin);
    auto* panel = reinterpret_cast<Unit*>(worker.panel());
    float* sums = worker.sums();
    const int64_t tiles = parts(part.row_end - part.row_begin, kRows);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int units = static_cast<int>(std::min<int64_t>(kDepth, depth - k));
      const bool few = tiles < 4;  // then turning takes the time, else multiplying
      Ahead ahead = after(part, k, few ? parts(units, kWidth) * (width / kWidth) : tiles);
      turn(part, k, units, width, reinterpret_cast<uint32_t*>(panel), few ? &ahead : nullptr);
      for (int64_t row = part.row_begin; row < part.row_end; row += kRows) {
        if (!few) ahead.fetch();
        const Unit* a = reinterpret_cast<const Unit*>(rows.line(part.head, row)) + k;
        float* to = sums + (row - part.row_begin) * width;
        add<Op>(static_cast<int>(std::min<int64_t>(kRows, part.row_end - row)), a, panel, units, width, to, k == 0);
      }
    }
    write(part, sums, width);
  }

  static int padded(int64_t n) { return static_cast<int>(parts(n, kWidth)) * kWidth; }

  // Columns of a block of the weights as rows of a panel, with zeros behind the last column.
  void turn(const Part& part, int64_t k, int units, int width, uint32_t* panel, Ahead* ahead) const {
    const char* first = weight(part.head, part.begin, k);
    const int count = static_cast<int>(part.end - part.begin);
    if (across) {
      for (int d = 0; d < units; ++d, panel += width, first += numbers() * weights.stride) {
        if (ahead && d % kWidth == 0)
          for (int j = 0; j < width; j += kWidth) ahead->fetch();
        line(first, count, panel);
        std::fill(panel + count, panel + width, 0);
      }
      return;
    }
    const int64_t stride = weights.stride / 4;
    const auto* from = reinterpret_cast<const uint32_t*>(first);
    for (int j = 0; j < width; j += kWidth, from += kWidth * stride) {
      const int here = std::min(kWidth, count - j);
      int d = 0;
      if (here == kWidth)
        for (; d + kWidth <= units; d += kWidth) {
          if (ahead) ahead->fetch();
          simd::transpose(from + d, stride, panel + d * width + j, width);
        }
      for (; d < units; ++d)
        for (int i = 0; i < kWidth; ++i) panel[d * width + j + i] = i < here ? from[i * stride + d] : 0;
    }
  }

  // One unit of depth of weights that lie across: floats as they are, two lines of bfloat16 paired.
  void line(const char* first, int count, uint32_t* to) const {
    if (type == kFloat32) {
      std::memcpy(to, first, count * sizeof(float));
      return;
    }
    const auto* low = reinterpret_cast<const uint16_t*>(first);
    const auto* high = reinterpret_cast<const uint16_t*>(first + weights.stride);
    const auto pair = [&](int j) { to[j] = low[j] | static_cast<uint32_t>(high[j]) << 16; };
    if (count == kPanel)
      for (int j = 0; j < kPanel; ++j) pair(j);  // no remainder: a third faster
    else
      for (int j = 0; j < count; ++j) pair(j);
  }

  // One block of depth of a tile of rows: the first sets the sums, later ones are added.
  template <class Op>
  void add(int count, const typename Op::Unit* a, const typename Op::Unit* panel, int units, int width, float* sums,
           bool first) const {
    if (first) {
      rows_product<Op>(count, a, rows.stride / 4, panel, width, units, width, sums, width, nullptr);
      return;
    }
    alignas(64) float block[kRows * kPanel];
    rows_product<Op>(count, a, rows.stride / 4, panel, width, units, width, block, width, nullptr);
    for (int i = 0; i < count * width; i += kWidth)
      simd::store(sums + i, simd::add(simd::load(sums + i), simd::load(block + i)));
  }

  void write(const Part& part, float* sums, int width) const {
    alignas(64) float added[kPanel] = {};
    const size_t item = item_size(type), count = part.end - part.begin;
    if (bias) widen(bias + part.begin * item, type, static_cast<int>(count), added);
    for (int64_t row = part.row_begin; row < part.row_end; ++row, sums += width) {
      if (bias)
        for (int j = 0; j < width; j += kWidth)
          simd::store(sums + j, simd::add(simd::load(sums + j), simd::load(added + j)));
      narrow(sums, type, width);
      std::memcpy(out.line(part.head, row) + part.begin * item, sums, count * item);
    }
  }
};

}  // namespace chunkcache
