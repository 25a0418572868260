#!/usr/bin/env bash
# Prints how many processes train on this machine: one for each visible GPU (CUDA_VISIBLE_DEVICES), rounded down to a power of
# two, which divides usual batch sizes; one without GPUs. The Makefile and local.sh use it.
set -euo pipefail
if command -v nvidia-smi >/dev/null; then # importing PyTorch takes seconds
    python -c "import torch; n = max(1, torch.cuda.device_count()); print(1 << n.bit_length() - 1)"
else
    echo 1
fi
