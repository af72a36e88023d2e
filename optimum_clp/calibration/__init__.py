"""Text: from files, lists and datasets, or written by the dense model itself; as rows of tokens."""
