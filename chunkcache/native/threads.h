// Work shared out to the threads that torch uses too.
#pragma once

#include <atomic>
#include <cstdint>
#include <immintrin.h>
#include <new>

extern "C" void GOMP_parallel(void (*task)(void*), void* data, unsigned threads, unsigned flags);

namespace chunkcache {

// Rounding and denormals as IEEE 754 has them, whatever the thread was set to.
class PlainArithmetic {
 public:
  PlainArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~PlainArithmetic() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

// Runs work(worker, i) for i from 0 to count - 1, each thread with a Worker of its own, which holds its
// scratch memory. The threads are torch's: the symbol is that of the OpenMP that torch brought
// (library.py), so that two pools never compete for cores. The team is always whole: libgomp ends
// threads that a smaller one leaves out, and torch would start them again.
template <class Worker, class Shape, class Work>
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
template <class Worker, class Shape, class Work>
bool run(const Shape& shape, int64_t count, int64_t threads, const Work& work) {
  return Team<Worker, Shape, Work>(shape, count, work).run(threads);
}

}  // namespace chunkcache
