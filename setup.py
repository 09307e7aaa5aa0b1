"""The one thing that setup.cfg cannot say: compiled modules.

Attention and linear layers are compiled once per instruction set; at run time the best module that
the processor can run is used. All are optional: without a compiler, or on other processors, torch
does the work. They use OpenMP and are linked to none, so that its symbols are those of the OpenMP that
torch brings.
"""

import sysconfig
from glob import glob

from setuptools import Extension, setup

# GCC takes the undefined vectors in its own AVX-512 headers for mistakes.
WARNINGS = ("-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
EXACT = ("-ffp-contract=off", "-fno-fast-math")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
SETS = {"_avx2": AVX2, "_avx512": AVX512, "_avx512bf16": (*AVX512, "-mavx512bf16")}
FOLDER = "chunkcache/native"
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")  # one module for all versions of Python
HEADERS = sorted(glob(f"{FOLDER}/*.h"))
LIMITED = [("Py_LIMITED_API", "0x030B0000")] if STABLE else []

setup(
    ext_modules=[
        Extension(
            f"{FOLDER.replace('/', '.')}.{name}",
            [f"{FOLDER}/module.cpp"],
            depends=HEADERS,
            define_macros=[("MODULE", name), *LIMITED],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                *EXACT,
                *WARNINGS,
                *flags,
            ],
            language="c++",
            py_limited_api=STABLE,
            optional=True,
        )
        for name, flags in SETS.items()
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
