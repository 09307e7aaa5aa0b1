"""The one thing that setup.cfg cannot say: compiled modules.

The native attention kernel is compiled once per instruction set; at run time the best one that the
processor has is used. All are optional: without a compiler, or on other processors, the torch kernel
does the work. They are compiled for OpenMP and linked to none, so that its symbols are those of the
OpenMP that torch brings.
"""

from setuptools import Extension, setup

FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-w")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
SETS = {"_avx2": AVX2, "_avx512": AVX512, "_avx512bf16": (*AVX512, "-mavx512bf16")}
FOLDER = "chunkcache/attention/native"

setup(
    ext_modules=[
        Extension(
            f"{FOLDER.replace('/', '.')}.{name}",
            [f"{FOLDER}/native.cpp"],
            depends=[f"{FOLDER}/simd.h"],
            define_macros=[("MODULE", name)],
            extra_compile_args=[*FLAGS, *instructions],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
        for name, instructions in SETS.items()
    ]
)
