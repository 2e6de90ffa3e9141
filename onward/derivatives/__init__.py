"""Mathematics on tensors and modules, with no algorithm in it: forward mode, per-sample gradients, random directions."""
