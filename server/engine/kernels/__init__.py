"""Machine code for operations that torch does slowly on a CPU, compiled by numba: it needs no C++ compiler.

    library.py     the loops, compiled when they are first asked for
    units.py       sizes of units of work, which those who call the loops know too
    attention.py   attention of a step, each sequence for itself
    small.py       norms, rotary embeddings and gates, which torch spreads over many operators; the best token
    threads.py     how they run: on torch's own threads
    vectors.py     the inner loops of attention, in LLVM's instructions
    compiler.py    numba's compiler, and where machine code is kept
    arithmetic.py  bfloat16 and float32, and the exponential function

All of it is optional: without numba, torch does the same.
"""
