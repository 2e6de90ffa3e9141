"""onward: train PyTorch networks without backpropagating through them."""

from onward import directions, forward_mode
from onward.cuts import default_cuts, suggest_cuts
from onward.errors import UsageError
from onward.estimators import DFA, DKP, FDFA, Backprop, Estimator, ForwardGradient, Step
from onward.validate import Problem, validate

__version__ = "0.1.0"
__all__ = [
    "DFA",
    "DKP",
    "FDFA",
    "Backprop",
    "Estimator",
    "ForwardGradient",
    "Problem",
    "Step",
    "UsageError",
    "default_cuts",
    "directions",
    "forward_mode",
    "suggest_cuts",
    "validate",
]
