"""Machine code for operations that are slow in torch on a CPU, compiled by numba, without a C++ compiler.

    library.py     the loops, compiled at their first use
    units.py       sizes of units of work, shared with the loops' callers
    attention.py   attention of a step, each sequence by itself
    small.py       norms, rotary embeddings, gates, and the best token
    threads.py     runs the loops on torch's own threads
    vectors.py     the inner loops of attention, in LLVM instructions
    compiler.py    numba's compiler and its cache on disk
    arithmetic.py  bfloat16 and float32, and the exponential function

The kernels are optional: without numba, torch computes the same.
"""
