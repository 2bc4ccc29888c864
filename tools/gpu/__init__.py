"""What does a real GPU say of flashquant? One command, and a page to paste into an issue.

    python -m tools.gpu                          where vLLM and flashquant are installed
    python -m tools.gpu --parts part-1.tar       without a network: vLLM comes in archives
    python -m tools.gpu --device cpu             a rehearsal without a GPU

    steps         what is run, in order of value; each step a program with a time limit
    runner        runs them, and passes on each fact at once
    page          the page: failures first
    machine       a step: the GPU, the driver, versions
    libraries     a step: vLLM's compiled libraries compute what torch computes
    environment   what these programs find in their environment

    pack          makes the archives, on a machine with a network
    packages      what is in them
    archives      wheels into archives, archives into parts
    fatbin        machine code of one kind of GPU in a compiled library
    unpack        archives into a folder that Python imports from

The other steps are `flashquant doctor` and `python -m benchmarks.gpu`. See docs/gpu.md.
"""
