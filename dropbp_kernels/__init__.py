"""dropbp_kernels."""
