"""Arithmetic that no library does well, as functions of tensors.

    log_probs   log-probabilities and entropies of tokens under any head, on any device
    cpu         what is faster on a CPU:
                attend_documents   causal attention of one packed row, document by document
                log_probs          log-probabilities of tokens under a plain head

A file of another device has the same functions, as far as it needs them, with the same arguments
and shapes. None knows of TRL, nor puts itself into transformers: `upstream` does both.
"""
