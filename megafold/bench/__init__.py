"""Measuring the operators: cases, time, memory, error, records, and what the compilers say.

- ``cases``: the registry of what is measured
- ``run``: measure cases and get records; ``measure``, ``memory``, ``accuracy``: its parts
- ``peers``: what could be used instead
- ``records``: rows of CSV, the only source of the figures
- ``scaling``: growth with size; ``profile``, ``training``: a whole training step
- ``roofline``: the best a device could do
- ``compile``: kernels compiled for GPUs that are not here; ``occupancy``: how many run at a time
- ``launches``: the kernels that a case launches, found without a GPU
- ``tune``, ``search``: block sizes tried; ``tuning_records``: what was tried, as rows of CSV
"""
