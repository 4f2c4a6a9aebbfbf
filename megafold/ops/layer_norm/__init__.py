"""What the operators with a LayerNorm in them share: statistics, rows, and two kernels."""
