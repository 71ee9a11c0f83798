"""Merge branches: the mathematics (methods), adapters in, an adapter or a model out."""
