"""Attention over chunks and linear layers for x86 processors, in C++, compiled once per instruction set."""
