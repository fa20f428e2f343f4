"""CUDA C++ for what Triton expresses badly, and the command that builds it."""
