"""jaxtune's configs, data and run directories on GPUs: transformers' Trainer, bitsandbytes and peft. No jax."""

import logging

# It advises another package on a CPU, when it is imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
