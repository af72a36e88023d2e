"""What the figures in the documentation were measured with; each script is run as `python -m benchmarks.NAME`."""
