"""Files for the edge: what they say, and how fast, how small and how much memory they are."""
