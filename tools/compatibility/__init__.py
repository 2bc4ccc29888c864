"""Every architecture in every scheme: exact, or by whom it is refused, and why.

    python -m tools.compatibility                         all of it; writes docs/compatibility.md
    python -m tools.compatibility --only gemma3 --scheme int8     a look; writes nothing
    python -m tools.compatibility --scheme "int8 TP=2" --write    a part, merged into the page

cell     what comes out of one
trial    one cell, in this process: two engines, pushes, a verdict
control  the same engine without flashquant: is it vLLM that cannot?
workers  the process that cells run in; one that dies or is late costs its cell
ranks    the same for cells over two ranks, in a pair of processes
table    verdicts as markdown, reasons as footnotes
"""
