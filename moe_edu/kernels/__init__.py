"""The CPU's fast paths: compiled code, and the same in PyTorch's operators."""
