"""Compiled kernels, run on a CPU: what a machine without a GPU can know of them.

program.py          reads PTX, the assembly that nvcc and Triton write
machine.py          runs it, all threads of a launch at once; arithmetic.py: what instructions compute
memory.py           memories that stop at addresses outside, unaligned or unwritten, and at races
fat_binary.py       finds device code in what nvcc compiled
triton_kernels.py   Triton's launches, compiled for an H200
cuda_extension.py   the CUDA extension's own host code and kernels; cudart.cpp: in place of CUDA's runtime

What it cannot show: what ptxas makes of the code, caches, and time.
"""
