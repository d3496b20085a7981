"""What zigzag_ext is compared with: `attention`, kernels of one layer; `duo_recreation`, a whole model."""
