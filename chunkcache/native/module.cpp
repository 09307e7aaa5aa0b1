// The Python side of the compiled code; one module per instruction set.
//
// Addresses come as integers, strides in bytes; what is at them is checked in Python, where tensors are.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cpuid.h>

#include "attention.h"
#include "copies.h"
#include "linear.h"

#ifndef MODULE
#error "name the module: -DMODULE=_avx2"
#endif

namespace {

using namespace chunkcache;

constexpr int kVersion = 6;  // of the arithmetic and of the arguments; as in library.py

// Shapes come as (heads, folded, dim, value_dim, chunk, segment, scale, type, latent, window, span,
// softcap), queries as (query, strides of its places and heads, output, sinks or 0); addresses and
// strides are integers, strides in bytes. attention/native.py checks them and says what the arrays hold.
#define SHAPE_FORMAT "(iiiiiifiiiif)"
#define SHAPE_FIELDS(s)                                                                             \
  &s.heads, &s.folded, &s.dim, &s.value_dim, &s.chunk, &s.segment, &s.scale, &s.type, &s.latent, \
      &s.window, &s.span, &s.softcap
#define QUERIES_FORMAT "(KLLKK)"

struct Asked {  // Queries, as Python hands them over
  unsigned long long query, out, sinks;
  long long place, head;

  operator Queries() const { return {at<char>(query), place, head, at<char>(out), at<float>(sinks)}; }
};
#define QUERIES_FIELDS(q) &q.query, &q.place, &q.head, &q.out, &q.sinks

struct Matrix {  // Matrices, as Python hands them over
  unsigned long long first;
  long long stride, head;

  template <class T>
  Matrices<T*> of() const {
    return {at<T>(first), stride, head};
  }
};
#define MATRIX_FORMAT "(KLL)"
#define MATRIX_FIELDS(m) &m.first, &m.stride, &m.head

// Runs work while other Python threads go on; it says whether there was memory enough.
template <class Work>
PyObject* unlocked(const Work& work) {
  bool done;
  Py_BEGIN_ALLOW_THREADS
  done = work();
  Py_END_ALLOW_THREADS
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* prefill(PyObject*, PyObject* args) {
  Prefill job;
  Asked asked;
  long long tokens, start, count, threads;
  unsigned long long blocks;
  if (!PyArg_ParseTuple(args, SHAPE_FORMAT QUERIES_FORMAT "LLKLL", SHAPE_FIELDS(job.shape), QUERIES_FIELDS(asked),
                        &tokens, &start, &blocks, &count, &threads))
    return nullptr;
  job.queries = asked, job.tokens = tokens, job.start = start, job.blocks = at<Block>(blocks), job.count = count;
  return unlocked([&] { return job.attend(threads); });
}

PyObject* step(PyObject*, PyObject* args) {
  Step job;
  Asked asked;
  long long rows, count, threads;
  unsigned long long limits, sources, items, segments, members, slots, states;
  if (!PyArg_ParseTuple(args, SHAPE_FORMAT QUERIES_FORMAT "LKKKKLKKKL", SHAPE_FIELDS(job.shape), QUERIES_FIELDS(asked),
                        &rows, &limits, &sources, &items, &segments, &count, &members, &slots, &states, &threads))
    return nullptr;
  job.queries = asked, job.rows = rows, job.limits = at<int64_t>(limits), job.sources = at<Block>(sources);
  job.items = at<Item>(items), job.segments = at<int64_t>(segments), job.count = count;
  job.members = at<int64_t>(members), job.slots = at<int64_t>(slots), job.states = at<float>(states);
  return unlocked([&] { return job.attend(threads); });
}

// Floats of memory that the states of a step take: (shape, slots of all rows).
PyObject* state_floats(PyObject*, PyObject* args) {
  Shape shape;
  long long slots;
  if (!PyArg_ParseTuple(args, SHAPE_FORMAT "L", SHAPE_FIELDS(shape), &slots)) return nullptr;
  return PyLong_FromSize_t(shape.heads * State::floats(slots * shape.folded, shape.value_columns()));
}

// x w^T + bias per head: (type, heads, rows, depth, columns, x, w, whether w lies depth by depth, bias or
// 0, out, threads); matrices are (address, stride of their lines, stride of their heads).
PyObject* linear(PyObject*, PyObject* args) {
  Linear job;
  int type, across;
  long long heads, count, depth, columns, threads;
  unsigned long long bias;
  Matrix rows, weights, out;
  if (!PyArg_ParseTuple(args, "iLLLL" MATRIX_FORMAT MATRIX_FORMAT "pK" MATRIX_FORMAT "L", &type, &heads, &count,
                        &depth, &columns, MATRIX_FIELDS(rows), MATRIX_FIELDS(weights), &across, &bias,
                        MATRIX_FIELDS(out), &threads))
    return nullptr;
  job.type = type, job.heads = heads, job.count = count, job.columns = columns;
  job.depth = type == kFloat32 ? depth : depth / 2;
  job.rows = rows.of<const char>(), job.weights = weights.of<const char>(), job.out = out.of<char>();
  job.across = across, job.bias = at<char>(bias);
  return unlocked([&] { return job.multiply(threads); });
}

// Copies of chunks: (bytes of a number, whether turned over, layers, matrices, rows, columns, strides of the
// layers here and there, pairs of addresses, how many).
PyObject* copy(PyObject*, PyObject* args) {
  Copies job;
  long long layers, matrices, rows, columns, from, to, count;
  unsigned long long pairs;
  if (!PyArg_ParseTuple(args, "ipLLLLLLKL", &job.size, &job.turned, &layers, &matrices, &rows, &columns, &from, &to,
                        &pairs, &count))
    return nullptr;
  job.layers = layers, job.matrices = matrices, job.rows = rows, job.columns = columns;
  job.from_stride = from, job.to_stride = to, job.pairs = at<Copies::Pair>(pairs), job.count = count;
  return unlocked([&] { return job.copy(), true; });
}

// Whether linear() takes bfloat16 and nothing here would be faster at it.
PyObject* pairs(PyObject*, PyObject*) {
  static const bool matrix_unit = [] {  // AMX, which libraries use; asking costs 20 us in a virtual machine
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1u);
  }();
  return PyBool_FromLong(kPairs && !matrix_unit);
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
                         {"linear", linear, METH_VARARGS, nullptr},
                         {"copy", copy, METH_VARARGS, nullptr},
                         {"pairs", pairs, METH_NOARGS, nullptr},
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