"""Arithmetic that no library does well, as functions of tensors.

    log_probs   log-probabilities and entropies of tokens under any head, on any device
    cpu         what is faster on a CPU:
                attend_documents   causal attention of one packed row, document by document
                log_probs          log-probabilities of tokens under a plain head
    cuda        attend_documents by flash-attention's kernel, where a card and a type allow it
    apart       attend_documents of any type on any device, and how a token weighs what it sees

On a CPU documents are told by their lengths, a list; elsewhere by where they end, a tensor that the
host does not read. None knows of TRL, nor puts itself into transformers: `upstream` does both.
"""
