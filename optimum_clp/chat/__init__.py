"""Trying a folder out: dense, cut and exported model answer side by side, on a local page or in the terminal."""
