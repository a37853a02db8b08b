"""Whether what lies on the disk is what was trained: the fourth rule of the hand-off contract.

Saved tensors are whole, finite and the trained ones; reloaded, the model gives the same logits on a
probe, with the same tokenizer and template; an adapter also does when it is merged into its base;
and generation writes several lines, and stops at the end of a turn. Whatever differs is refused
with UserError (3), NaN and Inf with (4).

Tensors are compared number by number, which needs no threshold, and tells of one wrong tensor in a
model of any size. Logits tell of what is made of them, a scale or a layer left out; what they may
differ by is `rounding`, of the precision, the depth and their own size. A base is held once: what
is reloaded borrows the weights of its files, part by part (`mapped`).

- `model`: a whole model, or one in parts
- `adapter`: an adapter, on its base and merged into it
- `saved`, `logits`, `stops`: what of these is compared
"""
