"""Gradient estimators, one rule a file; `onward/__init__.py` exports them.

A rule is registered when its file is imported. All are imported here, so that their order does not depend on who asks first.
"""

from onward.estimators import (
    backprop,
    dfa,
    dkp,
    drtp,
    fdfa,
    feedback_alignment,
    forward_forward,
    forward_gradient,
    grape,
    kolen_pollack,
    local,
    node,
    sign_symmetry,
    spsa,
)

__all__ = [
    "backprop",
    "dfa",
    "dkp",
    "drtp",
    "fdfa",
    "feedback_alignment",
    "forward_forward",
    "forward_gradient",
    "grape",
    "kolen_pollack",
    "local",
    "node",
    "sign_symmetry",
    "spsa",
]
