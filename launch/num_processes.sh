#!/usr/bin/env bash
# Prints how many processes train on this machine: one for each GPU that is visible (CUDA_VISIBLE_DEVICES), as many as the
# power of two that divides usual batch sizes; one without GPUs. The Makefile and local.sh ask here.
set -euo pipefail
if command -v nvidia-smi >/dev/null; then # importing PyTorch takes seconds
    python -c "import torch; n = max(1, torch.cuda.device_count()); print(1 << n.bit_length() - 1)"
else
    echo 1
fi
