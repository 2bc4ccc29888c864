"""The same engine tests on every version of vLLM that is claimed, one after another.

    python -m tools.versions                    every version; writes the table in docs/versions.md
    python -m tools.versions --only 0.30.0 -k qwen2    a quick look; writes nothing

overlay   a folder with one vLLM and what only it needs, in front of .venv
trial     seams and tests of one version, in processes of their own
table     what came out, as markdown
"""
