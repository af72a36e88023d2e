"""The cut: a smaller model over the dense model's own tensors, and the guard that holds it against what is meant."""
