"""The recipe: `CLPConfig`, one dataclass for each stage."""
