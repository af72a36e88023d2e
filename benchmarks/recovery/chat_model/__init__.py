"""The parts of `benchmarks.recovery.chat`: text, rivals, ours, training, what is measured, tables."""
