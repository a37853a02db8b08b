"""llmpipe: one command-line tool for the whole road of making a language model."""

__version__ = "0.1.0"
