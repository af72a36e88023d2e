"""Checkpoints and folders on disk: read with errors that help, written whole or not at all."""
