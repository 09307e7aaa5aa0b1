"""The kernel for x86 processors: attention over chunks in C++, compiled once per instruction set."""
