"""Real engines on this machine, looked at scheme by scheme: `flashquant doctor --gpu`.

A tiny model with random weights is served twice, by vLLM alone and by flashquant; after a push
both must hold the same bytes and say the same things. What a machine answers can be pasted
into an issue.

    policies   the two tiny checkpoints of a model
    engines    one scheme, in this process
    __main__   the same as a program: a crash in one scheme is then a finding, not the end
    programs   a program with a time limit, whose answers are read while it runs
    speed      the quantization kernels beside a copy
    front      one program a scheme, and the verdict
"""
