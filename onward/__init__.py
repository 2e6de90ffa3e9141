"""onward: train PyTorch networks without backpropagating through them."""

from onward import alignment, directions, forward_mode
from onward.distributed import ProcessLost, distribute
from onward.errors import UsageError
from onward.estimators import DFA, DKP, FDFA, Backprop, Estimator, ForwardGradient, LocalLoss, Step
from onward.heads import make_heads
from onward.pipeline import Stage
from onward.suggest import default_cuts, suggest_cuts
from onward.validate import Problem, validate

__version__ = "0.1.0"
__all__ = [
    "DFA",
    "DKP",
    "FDFA",
    "Backprop",
    "Estimator",
    "ForwardGradient",
    "LocalLoss",
    "Problem",
    "ProcessLost",
    "Stage",
    "Step",
    "UsageError",
    "alignment",
    "default_cuts",
    "directions",
    "distribute",
    "forward_mode",
    "make_heads",
    "suggest_cuts",
    "validate",
]
