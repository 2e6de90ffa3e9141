"""onward: train PyTorch networks without backpropagating through them.

What is listed here is public. Everything else may change from one version to the next.
"""

from onward import alignment
from onward.capturing.capture import capture
from onward.derivatives import directions
from onward.derivatives import tangents as forward_mode
from onward.derivatives.jvp import jvp
from onward.errors import UsageError
from onward.estimators.backprop import Backprop
from onward.estimators.base import Estimator, Step
from onward.estimators.dfa import DFA
from onward.estimators.dkp import DKP
from onward.estimators.drtp import DRTP
from onward.estimators.fdfa import FDFA
from onward.estimators.feedback import DirectFeedback, Feedback
from onward.estimators.feedback_alignment import FeedbackAlignment
from onward.estimators.forward_forward import ForwardForward
from onward.estimators.forward_gradient import ForwardGradient
from onward.estimators.grape import GrAPE
from onward.estimators.kolen_pollack import KolenPollack
from onward.estimators.lean import Lean
from onward.estimators.local import LocalLoss
from onward.estimators.node import NodePerturbation
from onward.estimators.settings import AtLeast, OneOf
from onward.estimators.sign_symmetry import BRSF, FRSF, USF
from onward.estimators.signals import Known, SignalEstimator
from onward.estimators.spsa import SPSA
from onward.network.heads import make_heads
from onward.network.suggest import default_cuts, suggest_cuts
from onward.network.validate import Problem, validate
from onward.parallel.shards import ProcessLost, distribute
from onward.parallel.stage import Stage

__version__ = "0.1.0"
__all__ = [
    "BRSF",
    "DFA",
    "DKP",
    "DRTP",
    "FDFA",
    "FRSF",
    "SPSA",
    "USF",
    "AtLeast",
    "Backprop",
    "DirectFeedback",
    "Estimator",
    "Feedback",
    "FeedbackAlignment",
    "ForwardForward",
    "ForwardGradient",
    "GrAPE",
    "Known",
    "KolenPollack",
    "Lean",
    "LocalLoss",
    "NodePerturbation",
    "OneOf",
    "Problem",
    "ProcessLost",
    "SignalEstimator",
    "Stage",
    "Step",
    "UsageError",
    "alignment",
    "capture",
    "default_cuts",
    "directions",
    "distribute",
    "forward_mode",
    "jvp",
    "make_heads",
    "suggest_cuts",
    "validate",
]
