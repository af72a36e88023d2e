"""Running an exported file in ONNX Runtime: opened, called like a model, compared with one.

Nothing here imports torch before [`causal_lm`] is: the process that checks a large file holds that file and no more.
"""
