"""Arithmetic that knows no model: Triton kernels (gpu), C++ kernels (native, cpp/), freed memory kept (allocator).

Nothing here imports anything else of sd.
"""
