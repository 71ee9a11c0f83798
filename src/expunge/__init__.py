"""Remove chosen content from a language model, keep everything else, and prove both."""

__version__ = "0.1.0"
