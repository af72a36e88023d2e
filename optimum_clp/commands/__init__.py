"""The command line: `optimum-cli clp ...` and `optimum-clp ...`.

Nothing here imports torch or transformers before a command runs.
"""
