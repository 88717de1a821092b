"""Fast code for the CPU: compiled C, and the same functions in PyTorch's operators."""
