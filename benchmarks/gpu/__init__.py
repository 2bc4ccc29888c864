"""How fast is flashquant on a GPU?

    python -m benchmarks.gpu                         everything, each part in a process of its own
    python -m benchmarks.gpu --only kernels pause
    python -m benchmarks.gpu --device cpu --small    a rehearsal: every line runs, no number counts

What is in it:

    kernels   rows of bf16 into codes, beside the copy limit and vLLM's own kernels
    reload    a whole reload: ours with and without undo log, vLLM's own, the copy, a restart
    pause     how long a prepared update keeps a busy engine from generating
    parts     which of these are run, on which models, and how
    facts     a line a fact, as soon as it is known
    scratch   where the checkpoints are written
"""
